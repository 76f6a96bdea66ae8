"""Observe: what a run is measured to hold, encoder included; when it is stopped; and what counts as the whole planned workload."""

from dataclasses import replace

import pytest
import torch
from families import ids
from transformers.modeling_outputs import BaseModelOutput

from tightfit.describe.source import describe
from tightfit.rehearse.rehearsal import rehearse
from tightfit.runtime.build import build
from tightfit.runtime.generate import Sampling, generate
from tightfit.runtime.observe import Observer
from tightfit.runtime.tokens import Prompt
from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError
from tightfit.terms.plan import Plan
from tightfit.terms.units import GIB, MIB
from tightfit.terms.workload import Workload


@pytest.fixture
def built(saved):
    """A saved family, built by a plan for `workload` and closed after the test."""
    held = []

    def make(family, workload, ram=1 << 62):
        skeleton = describe(str(saved(family)), workload.task)
        plan = replace(Plan.all_resident(str(saved(family)), workload, len(skeleton.block_bytes()), {}), budget=Budget(ram=ram))
        held.append(build(plan, skeleton))
        return held[-1]

    yield make
    for one in held:
        one.close()


@pytest.mark.parametrize(("family", "tokens"), [("t5", 300), ("t5", 8), ("llama", 200)])
def test_measured_is_what_was_rehearsed(family, tokens, built):
    """Also where the peak is the encoder's, which `generate` runs outside of the model's forward pass."""
    workload = Workload("generate", 1, tokens, 4)
    held = built(family, workload)
    rehearsed = rehearse(held.skeleton.meta_model, workload)
    assert rehearsed.peak_phase.startswith("encoder") == (tokens == 300)
    report = generate(held, Prompt(ids((1, tokens), 384)), Sampling(ignore_eos=True))
    assert report.measured_bytes == pytest.approx(rehearsed.peak_bytes, rel=0.02)


def test_a_decoders_passes_hold_what_the_encoder_gave(built):
    """Ten MiB that no operation of the decoder makes."""
    held = built("t5", Workload("generate", 1, 64, 2))
    hidden = torch.zeros(1, 40 * 1024, 64)[:, :64]
    with torch.inference_mode(), Observer(held) as observer:
        held.model(
            decoder_input_ids=torch.zeros((1, 1), dtype=torch.long),
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            use_cache=False,
        )
    assert 10 * MIB < observer.peak["activations"] < 11 * MIB


def test_the_first_token_waits_for_the_encoder(built, monkeypatch):
    held = built("t5", Workload("generate", 1, 8, 3))
    clock = [0.0]
    monkeypatch.setattr("tightfit.runtime.observe.time.perf_counter", lambda: clock[0])

    def takes(seconds):
        return lambda *_: clock.__setitem__(0, clock[0] + seconds)

    held.model.get_encoder().block[0].register_forward_pre_hook(takes(100.0))
    held.model.decoder.block[0].register_forward_pre_hook(takes(1.0))
    report = generate(held, Prompt(ids((1, 8), 384)), Sampling(ignore_eos=True))
    assert report.seconds["first_token"] == 101.0
    assert report.seconds["per_token"] == 1.0
    assert report.seconds["whole"] == 103.0


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_an_overrun_is_stopped_at_the_first_pass(family, built):
    """The encoder's, where there is one. The model is itself again afterwards."""
    held = built(family, Workload("generate", 1, 8, 3), ram=1 * MIB)
    decoded = []
    held.model.register_forward_pre_hook(lambda *_: decoded.append(1))
    forwards = [module.forward for module in (held.model, held.model.get_encoder())]
    with pytest.raises(TightfitError, match=r"stopped: the process holds .* of RAM, its budget is 1.0 MiB") as caught:
        generate(held, Prompt(ids((1, 8), 384)))
    assert "tightfit probe" in caught.value.hint
    assert len(decoded) == (0 if family == "t5" else 1)
    assert [module.forward for module in (held.model, held.model.get_encoder())] == forwards


@pytest.fixture
def on_gpu(built, monkeypatch):
    """A model that claims to be on a GPU, whose allocator has a peak and what it holds now, in bytes. Resetting forgets the peak."""
    peaks = {"max_memory_reserved": 0, "max_memory_allocated": 0, "memory_reserved": 0}
    for name in peaks:
        monkeypatch.setattr(torch.cuda, name, lambda _number, name=name: peaks[name])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _number: peaks.update(max_memory_reserved=peaks["memory_reserved"]))
    held = built("llama", Workload("generate", 1, 8, 1))
    return replace(held, device=torch.device("cuda"), plan=replace(held.plan, budget=Budget(ram=1 << 62, gpu=2 * GIB))), peaks


def test_the_gpus_peak_while_loading_is_kept(on_gpu):
    held, peaks = on_gpu
    peaks |= {"max_memory_reserved": 900, "memory_reserved": 500}
    with torch.inference_mode(), Observer(held) as observer:
        peaks |= {"max_memory_reserved": 700, "max_memory_allocated": 600}
        held.model(input_ids=ids((1, 8), 384))
    assert observer.report(1).gpu == {"allocated": 600, "reserved": 700, "load_reserved": 900}


def test_an_overrun_on_the_gpu_is_stopped(on_gpu):
    held, peaks = on_gpu
    with torch.inference_mode(), Observer(held):
        peaks["memory_reserved"] = 2 * GIB
        held.model(input_ids=ids((1, 8), 384))
        peaks["memory_reserved"] += 1
        with pytest.raises(TightfitError, match=r"torch's allocator holds 2.00 GiB of GPU memory, its budget is 2.00 GiB"):
            held.model(input_ids=ids((1, 8), 384))


def test_of_several_gpus_the_most_counts_and_the_fullest_is_measured(on_gpu, monkeypatch):
    held, _ = on_gpu
    spread = {"devices": (0, 1, 1, 1), "predicted_gpus": ({"weights": 5}, {"weights": 9})}
    held = replace(held, plan=replace(held.plan, budget=Budget(ram=1 << 62, gpu=1000, gpus=2), **spread))
    now, forgot = [300, 400], []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgot.append)
    for name, sizes in {"memory_reserved": now, "max_memory_reserved": [500, 450], "max_memory_allocated": [350, 320]}.items():
        monkeypatch.setattr(torch.cuda, name, lambda number, sizes=sizes: sizes[number])
    with torch.inference_mode(), Observer(held) as observer:
        held.model(input_ids=ids((1, 8), 384))
        now[1] = 1001
        with pytest.raises(TightfitError, match="torch's allocator holds 1001 B of GPU memory"):
            held.model(input_ids=ids((1, 8), 384))
    report = observer.report(1)
    assert forgot == [0, 1]
    assert report.gpu == {"allocated": 350, "reserved": 500, "load_reserved": 500}
    assert report.measured == {"weights": 0, "activations": 320}, "of GPU 1; no tensor of the test is on it"


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize(("tokens", "ignore_eos", "complete"), [(8, True, True), (7, True, False), (8, False, False)])
def test_complete_is_the_whole_planned_workload(family, tokens, ignore_eos, complete, built):
    """As many tokens read as planned, and as many written; else a lower peak than planned is no fault of the plan."""
    held = built(family, Workload("generate", 1, 8, 4))
    prompt = Prompt(ids((1, tokens), 384))
    whole = [int(token) for token in generate(held, prompt, Sampling(ignore_eos=True)).text.split()]
    assert len(whole) == 4
    (held.model.generation_config.eos_token_id, held.skeleton) = whole[0], replace(held.skeleton, folder="")
    assert generate(held, prompt, Sampling(ignore_eos=ignore_eos)).complete == complete


@pytest.mark.parametrize(("task", "tokens", "complete"), [("embed", 16, True), ("embed", 15, False), ("generate", 16, False)])
def test_a_pass_alone_completes_what_embeds(task, tokens, complete, built):
    held = built("llama", Workload(task, 1, 16, 128))
    with torch.inference_mode(), Observer(held) as observer:
        held.model(input_ids=ids((1, tokens), 384), use_cache=False)
    assert observer.report(0).complete == complete
