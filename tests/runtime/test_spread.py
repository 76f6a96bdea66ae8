"""Spread: blocks run where the plan puts them, nothing mixes devices, and the outputs are those of one device.

No machine of the tests has several GPUs. Where values count, all of them are `cpu` and what is sent is copied; where places count,
GPU 1 is torch's `meta`, another device with other tensors, which has shapes and no values.
"""

from dataclasses import replace

import pytest
import torch
from families import ids, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tightfit
from tightfit import steps
from tightfit.describe.blocks import block_lists, blocks_of
from tightfit.describe.source import describe
from tightfit.planner.spread import changes_of
from tightfit.rehearse.fake import inputs_for
from tightfit.runtime import build as building
from tightfit.runtime import spread
from tightfit.runtime.build import build
from tightfit.runtime.generate import Sampling
from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError
from tightfit.terms.machine import Machine
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload

CPU, META = torch.device("cpu"), torch.device("meta")
WORK = Workload("generate", 2, 12, 6)


def plan_of(family, devices, techniques=None):
    """A plan that nobody reckoned: only where blocks are counts."""
    held = ({"weights": 1},) * (max(devices) + 1)
    budget = Budget(ram=1 << 40, gpu=1 << 30, gpus=len(held))
    homes = ("gpu",) * len(devices)
    return Plan(family, WORK, budget, "exact", techniques or {}, homes, {"gpu": held[0]}, {}, {}, devices=devices, predicted_gpus=held)


def written(model):
    """Tokens that are written after a prompt, one by one against a cache, and all logits of the whole."""
    batch = inputs_for(model, WORK, ids)
    with torch.no_grad():
        cache, tokens, more = steps.new_cache(model), batch["input_ids"], {}
        if model.config.is_encoder_decoder:
            more = {"encoder_outputs": model.get_encoder()(input_ids=tokens)}
            tokens = tokens[:, :1]
        found = [steps.prefill(model, tokens, cache, **more)]
        while len(found) < WORK.new_tokens:
            found.append(steps.decode(model, found[-1], cache, **more))
        return torch.cat(found, 1), model(**inputs_for(model, Workload("embed", 2, 12), ids)).logits, cache


@pytest.fixture
def copies(monkeypatch):
    """All GPUs are the CPU, and what is sent arrives as a copy."""
    monkeypatch.setattr(spread, "device", lambda number: CPU)
    monkeypatch.setattr(spread, "sent", lambda tensor, there: tensor.clone())


@pytest.fixture
def sendings(monkeypatch):
    """GPU 0 is the CPU, GPU 1 is `meta`, from which zeros come back; what changed its device, in order: (shape, where to)."""
    told = []

    def sent(tensor, there):
        if tensor.device == there:
            return tensor
        told.append((tuple(tensor.shape), there.type))
        return torch.zeros_like(tensor, device=there)

    monkeypatch.setattr(spread, "device", lambda number: (CPU, META)[number])
    monkeypatch.setattr(spread, "sent", sent)
    return told


class Apart(TorchDispatchMode):
    """Refuses operations on tensors of several devices; a number of one element may be read from anywhere, as GPUs do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
        assert len({tensor.device for tensor in tensors}) <= 1, f"{func} reads from several devices"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "bloom", "opt", "gptj", "qwen3-moe", "t5"])
def test_what_is_written_is_what_one_device_writes(family, copies):
    model = make(family)
    skeleton = describe(model)
    count = len(blocks_of(model))
    devices = tuple(position * 3 // count for position in range(count))
    with build(plan_of(family, devices), skeleton) as held:
        tokens, logits, _ = written(held.model)
    own_tokens, own_logits, _ = written(model)
    assert torch.equal(tokens, own_tokens) and torch.equal(logits, own_logits)


@pytest.mark.parametrize("technique", ["int8", "nf4", "lora"])
def test_techniques_work_on_every_device(technique, copies):
    skeleton = describe(make("llama", torch.bfloat16))
    settings = {technique: {}}
    alone = Plan.all_resident("llama", WORK, 4, settings)
    with build(plan_of("llama", (0, 1, 1, 2), settings), skeleton) as held, build(alone, skeleton) as one:
        assert torch.equal(written(held.model)[1], written(one.model)[1])


def test_a_planned_spread_writes_what_one_device_writes(copies, saved):
    """From a budget to a text, through Hugging Face's `generate`."""
    folder, work = str(saved("llama")), Workload("generate", 1, 16, 8)
    machine = Machine(overhead_gpu=0, allocator_slack=0.0, link_bandwidth=1e7, disk_bandwidth=1e7)  # streaming is no answer
    room = tightfit.plan(folder, work, Budget(1 << 34, 1 << 30, 1 << 30), machine=machine).predicted_bytes("gpu")
    plan = tightfit.plan(folder, work, Budget(1 << 34, room * 3 // 4, 1 << 30, gpus=2), machine=machine)
    assert set(plan.devices) == {0, 1} and not plan.techniques
    alone = tightfit.plan(folder, work, Budget(1 << 34))
    report, own = (tightfit.run(each, "one two three", Sampling(ignore_eos=True)) for each in (plan, alone))
    assert report.tokens == own.tokens == 8 and report.text == own.text


@pytest.mark.parametrize("family", ["llama", "gpt-neox", "bloom", "opt", "t5"])
@pytest.mark.parametrize("split", [1, 3])
def test_every_operation_finds_its_tensors_on_one_device(family, split, sendings):
    """Weights, activations and caches."""
    model = make(family)
    count = len(blocks_of(model))
    devices = tuple(0 if position < split else 1 for position in range(count))
    with build(plan_of(family, devices), describe(model)) as held:
        inside = {f"{path}.": (CPU, META)[number] for (path, _), number in zip(blocks_of(held.model), devices, strict=True)}
        for name, tensor in (*held.model.named_parameters(), *held.model.named_buffers()):
            assert tensor.device == next((there for path, there in inside.items() if name.startswith(path)), CPU), name
        with Apart():
            _, logits, cache = written(held.model)
        assert logits.device == CPU
        layers = getattr(cache, "self_attention_cache", cache).layers
        decoder = devices[count - len(layers) :]
        assert [layer.keys.device for layer in layers] == [(CPU, META)[number] for number in decoder]


def test_hidden_states_change_the_device_as_often_as_is_reckoned(sendings):
    model = make("llama")
    batch = inputs_for(model, Workload("embed", 2, 12), ids)
    width = (2, 12, model.config.hidden_size)
    for devices in ((0, 0, 1, 1), (0, 1, 1, 0), (1, 1, 1, 1), (0, 1, 0, 1)):
        with build(plan_of("llama", devices), describe(model)) as held, torch.no_grad():
            sendings.clear()
            held.model(**batch, use_cache=False)
        stacks = [len(stack) for _, stack in block_lists(model)]
        assert [shape for shape, _ in sendings].count(width) == sum(changes_of(devices, stacks))
        beside = [shape for shape, _ in sendings if shape != width]
        assert len(beside) == len(set(beside)) + 1, "cosines and sines of one shape, each once however many blocks want them"


def test_the_check_sees_blocks_to_which_nothing_is_brought(sendings, monkeypatch):
    monkeypatch.setattr(spread, "spread_over", lambda model, devices: None)
    with build(plan_of("llama", (0, 0, 1, 1)), describe(make("llama"))) as held, Apart(), pytest.raises((AssertionError, RuntimeError)):
        written(held.model)


def test_too_few_gpus_are_refused(monkeypatch):
    skeleton = describe(make("llama"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(TightfitError, match="spreads blocks over 2 GPUs, and torch finds 1 here"):
        build(plan_of("llama", (0, 0, 1, 1)), skeleton)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TightfitError, match="torch finds none here"):
        build(plan_of("llama", (0, 0, 1, 1)), skeleton)


def test_each_gpus_allocator_is_capped(monkeypatch):
    """The calls to torch's allocator, which no machine of the tests has on several GPUs."""
    capped, plan = {}, plan_of("llama", (0, 1, 1, 2))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: type("Card", (), {"total_memory": 4 << 30}))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, number: capped.update({number: share}))
    building._cap_allocator(replace(plan, budget=replace(plan.budget, gpu=2 << 30)))
    assert capped.keys() == {0, 1, 2} and len(set(capped.values())) == 1 and 0.3 < capped[0] < 0.5


def test_one_gpu_is_the_processs_current_one():
    """Which `accelerate launch` may have chosen."""
    assert spread.gpus_of(replace(plan_of("llama", (0, 1, 1, 2)), devices=(), predicted_gpus=())) == [None]
    assert spread.gpus_of(Plan.all_resident("llama", WORK, 4, {})) == []
