"""Choose: plenty of room, less, and too little, on a tiny Llama; the promise that a plan keeps to every tier, and hints that work."""

import functools
import re

import pytest
import torch
from families import make

from tightfit import catalog
from tightfit.describe.blocks import blocks_of
from tightfit.describe.source import describe
from tightfit.planner import choose as choosing
from tightfit.planner.choose import SLOT_SLACK, choose
from tightfit.planner.outcome import Request
from tightfit.planner.residency import resident
from tightfit.planner.weigh import weigh
from tightfit.rehearse.rehearsal import rehearse
from tightfit.terms.budget import Budget
from tightfit.terms.errors import DoesNotFit, TightfitError
from tightfit.terms.footprint import KINDS, total
from tightfit.terms.machine import Machine
from tightfit.terms.plan import Plan
from tightfit.terms.units import parse_size, show_bytes
from tightfit.terms.workload import Workload

MACHINE = Machine(probed=True, overhead_ram=3_000_000, overhead_gpu=1_000_000, overhead_bitsandbytes=200_000, allocator_slack=0.01)
GENERATE, TUNE = Workload("generate", 1, 48, 16), Workload("tune", 1, 64)
PLENTY = 1 << 40
ALL = catalog.technique_names()


@pytest.fixture(autouse=True, scope="module")
def _rehearsed_once():
    """A rehearsal knows nothing of budgets, so one for each model, workload and set of techniques suffices."""
    known = {}

    def remembered(make_model, workload, techniques):
        key = (make_model.__self__.name, workload, techniques)
        if key not in known:
            known[key] = rehearse(make_model, workload, techniques)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "rehearse", remembered)
        yield


@functools.cache
def skeleton(family: str = "llama", trainable: str = ""):
    """A live model; `trainable` names the only parameters that learn."""
    from dataclasses import replace

    model = make(family, torch.bfloat16)
    if trainable:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable in name)
    return replace(describe(model), name=f"{family}{trainable}")


def planned(
    workload: Workload = GENERATE,
    ram: int = PLENTY,
    gpu: int = 0,
    disk: int = PLENTY,
    quality: str = "exact",
    names: list[str] = ALL,
    asked: dict[str, dict[str, object]] | None = None,
    model=None,
    machine: Machine = MACHINE,
) -> Plan:
    available = {name: catalog.technique(name) for name in names}
    return choose(Request(model or skeleton(), workload, Budget(ram, gpu, disk), quality, asked or {}), machine, available)


def test_with_plenty_of_room_everything_stays_as_it_is_stored():
    plan = planned()
    assert plan.residency == ("ram",) * 4
    assert (dict(plan.techniques), plan.quality, plan.streamed_bytes) == ({}, "exact", 0)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in [*skeleton().live.parameters(), *skeleton().live.buffers()])
    assert plan.predicted["ram"]["weights"] == weights
    assert {name for turned in plan.turned_down for name in turned.techniques} >= {"int8", "nf4"}


def test_with_less_room_blocks_stream_and_the_others_stay_in_between():
    whole = planned().predicted_bytes("ram")
    plan = planned(ram=whole - 1, names=["offload"])
    blocks = [sum(p.numel() * p.element_size() for p in block.parameters()) for _, block in blocks_of(skeleton().live)]
    streamed = plan.techniques["offload"]["streamed"]
    assert set(plan.techniques) == {"offload"}
    assert plan.quality == "exact"
    assert plan.residency == tuple("disk" if position in streamed else "ram" for position in range(4))
    assert set(range(4)) - set(streamed) == resident(4, 4 - len(streamed))
    assert plan.streamed_bytes == sum(blocks[position] for position in streamed) > 0
    assert plan.predicted_bytes("ram") < whole
    saved = sum(blocks[position] for position in streamed) - plan.techniques["offload"]["slots"] * (max(blocks) + SLOT_SLACK)
    assert plan.predicted["ram"]["weights"] == planned().predicted["ram"]["weights"] - saved


def test_too_little_room_is_refused_with_what_is_missing_and_a_hint_that_works():
    with pytest.raises(DoesNotFit) as caught:
        planned(ram=MACHINE.overhead_ram + 10_000)
    error = caught.value
    assert re.match(r"`llama` needs [\d.]+ [KMG]iB on ram to write text.*; the budget is 2.9 MiB$", str(error))
    told = dict(re.findall(r"(\w+) ([\d.]+ \w?i?B)", error.details))
    assert set(told) <= set(KINDS) and {"weights", "overhead"} <= set(told)
    need = parse_size(re.search(r"needs ([\d.]+ \w+)", str(error))[1])
    assert sum(parse_size(size) for size in told.values()) == pytest.approx(need, rel=0.05)
    assert "--ram" in error.hint


@pytest.mark.parametrize("workload", [GENERATE, Workload("embed", 4, 128), TUNE], ids=str)
@pytest.mark.parametrize("quality", ["exact", "near"])
@pytest.mark.parametrize("tier", ["ram", "gpu"])
def test_every_refusals_hint_works(workload, quality, tier):
    """What the hint says is typed, word by word, until the plan fits; every refusal says something new."""
    fixed = MACHINE.overhead_gpu if tier == "gpu" else MACHINE.overhead_ram
    for room in (-900_000, 0, 50_000, 200_000, 300_000):
        said = {"ram": 0 if tier == "gpu" else PLENTY, "disk": 0, tier: fixed + room, "quality": quality}
        hints = []
        while True:
            try:
                plan = planned(workload, **said)
                break
            except DoesNotFit as refused:
                assert refused.hint not in hints
                hints.append(refused.hint)
                told = dict(re.findall(r"--(\w+) ([\w.]+)", refused.hint))
                assert told and set(told) <= {"ram", "gpu", "quality", "disk"}, refused.hint
                said |= {name: value if name == "quality" else parse_size(value) for name, value in told.items()}
        assert len(hints) >= (room <= 0)
        assert len(hints) <= 3
        assert plan.predicted_bytes(tier) <= said[tier]


ROOMS = [*range(0, 600_000, 36_000), 1_200_000, 2_000_000, 4_000_000]


@pytest.mark.parametrize("tier", ["ram", "gpu"])
@pytest.mark.parametrize("workload", [GENERATE, TUNE], ids=str)
def test_more_room_is_never_slower_and_every_tier_is_kept(workload, tier):
    behind = (
        [(PLENTY, PLENTY), (20_300_000, 250_000), (20_150_000, 100_000), (2_000_000, PLENTY)]
        if tier == "gpu"
        else [(0, PLENTY), (0, 150_000)]
    )
    for ram, disk in behind:
        before = None
        for room in ROOMS:
            gpu = MACHINE.overhead_gpu + room if tier == "gpu" else 0
            budget = Budget(ram or MACHINE.overhead_ram + room, gpu, disk)
            try:
                plan = planned(workload, budget.ram, budget.gpu, budget.disk, "near")
            except DoesNotFit:
                assert before is None, "what fitted before must fit with more room"
                continue
            assert all(0 < plan.predicted_bytes(held) <= budget.bytes_of(held) for held in plan.predicted), (budget, plan.predicted)
            pace = plan.seconds.get("step") or plan.seconds["prefill"] + (workload.new_tokens - 1) * plan.seconds["token"]
            assert before is None or pace <= before
            before = pace
        assert (before is None) == (ram == 2_000_000), "only where RAM holds not even the process nothing ever fits"


def test_near_takes_few_bits_where_they_let_all_blocks_stay():
    """A slow disk makes streaming slow; eight bits fit whole where sixteen do not."""
    slow = Machine(probed=True, overhead_ram=0, overhead_bitsandbytes=1 << 40, allocator_slack=0.0, disk_bandwidth=1e5)
    exact = planned(machine=slow)
    cap = exact.predicted_bytes("ram") - 100_000
    streamed, near = planned(ram=cap, machine=slow), planned(ram=cap, quality="near", machine=slow)
    assert "disk" in streamed.residency
    assert (near.residency, near.quality, set(near.techniques)) == (("ram",) * 4, "near", {"int8"})
    reasons = {turned.techniques: turned.reason for turned in streamed.turned_down}
    assert "as fast, but keeps only `near` quality" in reasons[("int8",)]
    assert "slower" in {turned.techniques: turned.reason for turned in near.turned_down}[()]


def test_what_is_asked_for_is_taken():
    plan = planned(asked={"int8": {"where": "mlp"}})
    assert plan.techniques == {"int8": {"where": "mlp"}}
    assert plan.quality == "near"


def test_a_technique_that_does_not_apply_is_told_and_one_that_was_asked_for_is_refused():
    with pytest.raises(TightfitError, match="found no linear layer"):
        planned(asked={"int8": {"where": "nowhere"}})


def test_tuning_streams_only_what_is_frozen_and_recomputed():
    frozen = skeleton(trainable="embed_tokens")
    resident_plan = planned(TUNE, model=frozen, names=["offload"])
    cap = resident_plan.predicted_bytes("ram") - 1
    with pytest.raises(DoesNotFit):
        planned(TUNE, ram=cap, model=frozen, names=["offload"])
    with pytest.raises(DoesNotFit):
        planned(TUNE, ram=planned(TUNE, names=["offload", "recompute"], asked={"recompute": {}}).predicted_bytes("ram") - 1)
    recomputed = planned(TUNE, model=frozen, names=["offload", "recompute"], asked={"recompute": {}}).predicted_bytes("ram")
    plan = planned(TUNE, ram=recomputed - 1, model=frozen, names=["offload", "recompute"])
    assert set(plan.techniques) == {"recompute", "offload"}
    assert "disk" in plan.residency


def test_what_streams_in_another_form_needs_the_disk():
    asked = {"int8": {}}
    whole = planned(asked=asked)
    cap = whole.predicted_bytes("ram") - 1
    streamed = planned(ram=cap, asked=asked)
    spilled = streamed.predicted["disk"]["weights"]
    assert spilled == streamed.streamed_bytes > 0
    assert planned(ram=cap, asked=asked, disk=spilled).residency == streamed.residency
    with pytest.raises(DoesNotFit) as caught:
        planned(ram=cap, asked=asked, disk=spilled - 1)
    assert "--disk" in caught.value.hint or "--ram" in caught.value.hint


def test_a_checkpoint_needs_the_disk_only_where_its_blocks_do_not_lie_in_it(saved):
    """Plain blocks are read from the model's own files; experts that transformers fuses are joined into a spill file."""
    plain, fused = describe(str(saved("llama"))), describe(str(saved("mixtral")))
    assert not weigh(plain, []).changed
    assert weigh(plain, [], random_weights=True).changed
    assert weigh(fused, []).changed and weigh(skeleton(), []).changed
    cap = planned(model=fused, names=["offload"]).predicted_bytes("ram") - 1
    spilled = planned(ram=cap, model=fused, names=["offload"]).predicted["disk"]["weights"]
    assert planned(ram=cap, disk=spilled, model=fused, names=["offload"]).predicted["disk"]["weights"] == spilled > 0
    with pytest.raises(DoesNotFit):
        planned(ram=cap, disk=spilled - 1, model=fused, names=["offload"])


def test_ram_behind_a_gpu_holds_what_streams_and_the_process():
    plan = planned(gpu=planned(gpu=PLENTY).predicted_bytes("gpu") - 1, names=["offload"])
    streamed = set(plan.techniques["offload"]["streamed"])
    assert plan.residency == tuple("ram" if position in streamed else "gpu" for position in range(4))
    assert plan.predicted["ram"]["weights"] == plan.streamed_bytes
    assert plan.predicted["ram"]["overhead"] >= MACHINE.overhead_ram


def test_a_gpu_whose_process_has_no_room_in_ram_is_refused():
    with pytest.raises(DoesNotFit, match="on ram"):
        planned(gpu=PLENTY, ram=MACHINE.overhead_ram - 1)


def test_a_plan_says_why():
    everything, streaming = planned(), planned(ram=planned().predicted_bytes("ram") - 1, names=["offload"])
    assert "all 12 blocks stay on ram".replace("12", "4") in everything.reasons
    assert "stream through 2 slots" in " ".join(streaming.reasons)
    assert everything.notes == ()
    assert "tightfit probe" in " ".join(planned(machine=Machine()).notes)
    assert total(everything.predicted["ram"]) == max(map(total, everything.phases.values())) + everything.predicted["ram"]["overhead"]
    assert show_bytes(everything.predicted_bytes("ram"))
