"""Quantize: block by block as a plain loop over the whole model would do it, resumed after any end, and loaded by everybody."""

import json
import re

import pytest
import torch
from families import make

import tightfit
from tightfit import catalog
from tightfit.describe.blocks import blocks_of
from tightfit.describe.source import describe
from tightfit.formats.linear import QuantizedLinear, replace
from tightfit.runtime import calibrate
from tightfit.runtime.build import build
from tightfit.runtime.calibrate import Door, Walk, advance, first_states, means_of
from tightfit.runtime.quantize import UNFINISHED, Job, quantize
from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload
from tightfit.verbs.quantizing import plan_quantize
from tightfit.verbs.quantizing import quantize as carry_out

FAMILIES = ["llama", "llama-tied", "qwen3", "gpt-neox", "opt", "bloom", "gpt2", "gptj", "bert", "qwen3-moe", "mixtral"]
SAMPLES = torch.randint(1, 384, (6, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def aims_at_few_tokens(monkeypatch):
    """The samples here are short."""
    monkeypatch.setattr(calibrate, "TOKENS_PER_COLUMN", 0)


def job(folder, technique="lean:bits=3", **settings):
    name, given = catalog.parse(technique)
    return Job(describe(str(folder), "embed"), catalog.make(name, given), SAMPLES, 2, torch.device("cpu"), **settings)


def loaded(folder, family):
    import transformers

    return getattr(transformers, type(make(family)).__name__).from_pretrained(folder).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=SAMPLES[:2]).logits.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_rounding_the_live_model_gives(family, saved, tmp_path):
    quantize(job(saved(family), "rtn:bits=4"), tmp_path / "out")
    expected = tightfit.apply(loaded(saved(family), family), ["rtn:bits=4"])
    assert torch.equal(logits(loaded(tmp_path / "out", family)), logits(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_feeds_every_block_what_the_whole_model_feeds_it(family, saved):
    model = loaded(saved(family), family)
    blocks, seen = blocks_of(model), []
    for _, block in blocks:
        block.register_forward_hook(lambda _, args, output: seen.append(output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        model(input_ids=SAMPLES)
    expected, walk = list(seen), Walk(model, blocks, SAMPLES, 2, torch.device("cpu"))
    with torch.no_grad():
        states, calls = first_states(walk)
        for (_, block), call, output in zip(blocks, calls, expected, strict=True):
            advance(walk, Door(block, states, call))
            assert torch.allclose(states.float(), output.float(), atol=2e-2 if states.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(("fault", "line"), [("depends", "what depends on the text"), ("twice", "again for one pass"), ("odd", "OddError")])
def test_models_of_another_build_are_refused_in_one_line(fault, line, saved):
    model = loaded(saved("llama"), "llama")
    inner = model.model.forward

    def odd(*args, **kwargs):
        if fault == "odd":
            raise type("OddError", (ValueError,), {})("no")
        if fault == "depends":
            kwargs["extra"] = kwargs["input_ids"].float()
        return inner(*args, **kwargs)

    model.model.forward = odd
    if fault == "twice":
        model.model.layers[1] = model.model.layers[0]
    with pytest.raises(TightfitError, match=line), torch.no_grad():
        first_states(Walk(model, blocks_of(model), SAMPLES, 2, torch.device("cpu")))


def test_a_layer_aims_at_the_dense_model_only_where_tokens_tell_enough(monkeypatch):
    monkeypatch.undo()
    few, enough = torch.randn(31, 8), torch.randn(32, 8)
    assert means_of([(few, few)])[1] is None
    hessian, cross = means_of([(enough[:20], -enough[:20]), (enough[20:], -enough[20:])])
    torch.testing.assert_close(hessian, enough.t() @ enough / 16)
    torch.testing.assert_close(cross, -hessian)


def inputs_of(model, path):
    """What a layer is fed for all samples.  # → (tokens, columns)"""
    inputs = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for sample in SAMPLES:
        with torch.no_grad():
            model(input_ids=sample[None])
    hook.remove()
    return torch.cat(inputs, dim=1)[0]


def by_a_plain_loop(folder, family, technique):
    """Quantize a live model: after each group of layers everything runs anew from the start, and hooks gather inputs, dense ones too."""
    dense, model, (name, given) = loaded(folder, family), loaded(folder, family), catalog.parse(technique)
    solver, target = catalog.make(name, given), tightfit.apply(loaded(folder, family), [technique])
    for path, block in blocks_of(model):
        for group in (["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]):
            layers = [at for at, module in block.named_modules() if at.rpartition(".")[2] in group]
            x, y = (inputs_of(each, f"{path}.{layers[0]}") for each in (model, dense))
            for at in layers:
                quantized = target.get_submodule(f"{path}.{at}")
                quantized.keep(
                    solver.solve(block.get_submodule(at).weight.detach().float(), 2 * x.t() @ x / len(x), 2 * y.t() @ x / len(x))
                )
                replace(block, at, quantized)
    return model


@pytest.mark.parametrize("technique", ["gptq:bits=3,group=32", "lean:bits=2,rounds=1,spread=false"])
def test_blocks_are_solved_for_what_those_before_them_became(technique, saved, tmp_path):
    quantize(job(saved("llama"), technique), tmp_path / "out")
    found, expected = loaded(tmp_path / "out", "llama"), by_a_plain_loop(saved("llama"), "llama", technique)
    ours, theirs = logits(found), logits(expected)
    assert ((ours - theirs).norm() / theirs.norm()).item() < 0.05  # sums in another order; a code at a tie moves others
    rounded = logits(tightfit.apply(make("llama"), [technique]))
    assert ((rounded - theirs).norm() / theirs.norm()).item() > 0.2


def test_a_run_that_was_stopped_goes_on_where_it_was(saved, tmp_path):
    quantize(job(saved("llama")), tmp_path / "whole")

    def stop(done, whole, layer):
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(job(saved("llama"), progress=stop), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / f"out{UNFINISHED}").glob("*.safetensors")}
    assert len(before) == 2
    with pytest.raises(TightfitError, match="not finished"):
        quantize(job(saved("llama")), tmp_path / "out")
    with pytest.raises(TightfitError, match="another technique"):
        quantize(job(saved("llama"), "lean:bits=2"), tmp_path / "out", resume=True)
    quantize(job(saved("llama"), on_disk=True), tmp_path / "out", resume=True)
    files = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == stamp for name, stamp in before.items())


@pytest.mark.parametrize("technique", ["lean:bits=3", "lean:bits=4,grid=affine,group=32"])
def test_our_own_runs_take_it_too_resident_and_streamed(technique, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("tightfit.runtime.spill.Spill.write", None)  # blocks stream from the model's own files
    quantize(job(saved("llama"), technique), tmp_path / "out")
    expected = logits(loaded(tmp_path / "out", "llama"))
    skeleton = describe(str(tmp_path / "out"), "embed")
    for techniques, homes in (({}, ("ram",) * 4), ({"offload": {"streamed": (0, 2)}}, ("disk", "ram", "disk", "ram"))):
        plan = Plan.all_resident(str(tmp_path / "out"), Workload("embed", 2, 24), 4, techniques)
        plan = Plan.from_json({**plan.to_json(), "residency": homes})
        with build(plan, skeleton) as built:
            assert torch.equal(logits(built.model), expected)
            assert (built.stream is not None) == bool(techniques)


@pytest.mark.parametrize("adapter", ["lora", "side:reduction=4"])
def test_adapters_learn_on_top(adapter, saved, tmp_path):
    quantize(job(saved("llama")), tmp_path / "out")
    model = tightfit.apply(loaded(tmp_path / "out", "llama"), [adapter])
    assert torch.equal(logits(model.eval()), logits(loaded(tmp_path / "out", "llama")))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=0.02)
    losses = []
    for _ in range(8):
        loss = model.train()(input_ids=SAMPLES, labels=SAMPLES).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not module.weight.requires_grad for module in model.modules() if isinstance(module, QuantizedLinear))


def test_saving_again_keeps_the_bits(saved, tmp_path):
    quantize(job(saved("llama")), tmp_path / "out")
    model = loaded(tmp_path / "out", "llama")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again", "llama")), logits(model))


def test_models_that_cannot_be_walked_through_are_refused(saved, tmp_path):
    with pytest.raises(TightfitError, match="2 stacks of blocks"):
        quantize(job(saved("t5"), "rtn"), tmp_path / "out")
    quantize(job(saved("llama"), "rtn"), tmp_path / "out")
    with pytest.raises(TightfitError, match="already quantized, to 4 bits"):
        plan_quantize(str(tmp_path / "out"), None, "rtn")
    with pytest.raises(TightfitError, match="is there already"):
        quantize(job(saved("llama"), "rtn"), tmp_path / "out")


@pytest.mark.parametrize("damage", ["bits", "layers", "format"])
def test_a_damaged_config_is_told(damage, saved, tmp_path):
    quantize(job(saved("llama"), "rtn"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"] |= {"bits": {"bits": 5}, "layers": {"layers": ["model.layers.9.mlp"]}, "format": {"format": "x"}}[damage]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(TightfitError, match=r"5 bits|no such layer|damaged|cannot be|config"):
        describe(str(tmp_path / "out"), "embed")


def test_the_dense_model_is_never_there_whole(saved, tmp_path):
    made = job(saved("llama"), "rtn")
    alive = []

    def look(done, whole, layer):
        dense = [path for path, block in made.blocks if any(not parameter.is_meta for parameter in block.parameters())]
        alive.append(len(dense))

    made.progress = look
    quantize(made, tmp_path / "out")
    assert max(alive) == 1 and len(alive) == 28


def test_a_text_too_short_to_aim_is_told_beforehand():
    def notes(samples, technique="lean"):
        return plan_quantize("tightfit-demo", torch.ones(samples, 64, dtype=torch.long), technique).notes

    columns = widest("tightfit-demo")
    assert notes(1) == (f"64 tokens do not suffice to aim layers of {columns} columns at the dense model; {4 * columns} would",)
    assert notes(1, "gptq") == () == notes(columns // 16)


def widest(model):
    blocks = describe(model, "embed").meta_model().model.layers
    return max(module.in_features for module in blocks.modules() if isinstance(module, torch.nn.Linear))


def test_what_a_layer_is_fed_is_planned_beside_the_dense_block():
    samples = torch.ones(4, 512, dtype=torch.long)
    plans = [plan_quantize("tightfit-demo", samples, "lean", {"aim": aim}, Budget.parse(None, "4GiB", "100GiB")) for aim in (0.5, 0.0)]
    states = 4 * 512 * 256 * 2
    assert plans[0].predicted["activations"] - plans[1].predicted["activations"] == states + 4 * 4 * 512 * widest("tightfit-demo")


def test_experts_that_the_text_does_not_reach_are_told_afterwards(saved, tmp_path):
    folder, samples = str(saved("mixtral")), SAMPLES[:1, :8]
    report = carry_out(plan_quantize(folder, samples, "gptq"), samples, str(tmp_path / "out"))
    assert len(report.notes) == 1 and re.fullmatch(
        r"too little of the text reaches \d+ experts; they are rounded as they are", report.notes[0]
    )
    assert report.to_json()["notes"] == report.notes


def test_behind_a_gpu_hidden_states_rest_in_ram():
    samples = torch.ones(512, 1024, dtype=torch.long)
    plans = {ram: plan_quantize("tightfit-demo", samples, "gptq", {}, Budget.parse("4GiB", ram, "100GiB")) for ram in ("1200MiB", "600MiB")}
    states = 512 * 1024 * 256 * 2
    assert [plan.states_on for plan in plans.values()] == ["ram", "disk"]
    assert plans["1200MiB"].predicted == plans["600MiB"].predicted
    inside = plan_quantize("tightfit-demo", samples, "gptq", {}, Budget.parse(None, "4GiB", "100GiB"))
    assert inside.predicted["activations"] == plans["600MiB"].predicted["activations"] + states
