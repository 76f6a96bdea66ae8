"""Choose: plenty of room, less, and too little; the promise that a plan keeps to every tier."""

import re
import sys

import pytest
import torch
from families import make
from planning import GENERATE, MACHINE, PLENTY, TUNE, planned, skeleton

from tightfit import catalog
from tightfit.describe.blocks import blocks_of
from tightfit.describe.source import describe
from tightfit.planner.choose import SLOT_SLACK, choose
from tightfit.planner.outcome import Request
from tightfit.planner.residency import resident
from tightfit.planner.weigh import weigh
from tightfit.runtime import spill
from tightfit.runtime.build import build
from tightfit.terms.budget import Budget
from tightfit.terms.errors import DoesNotFit, TightfitError
from tightfit.terms.footprint import KINDS, total
from tightfit.terms.machine import Machine
from tightfit.terms.units import GIB, parse_size, show_bytes


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


ROOMS = [*range(0, 600_000, 36_000), 1_200_000, 2_000_000, 4_000_000]


@pytest.mark.parametrize("tier", ["ram", "gpu"])
@pytest.mark.parametrize("workload", [GENERATE, TUNE], ids=str)
def test_more_room_is_never_slower_and_every_tier_is_kept(workload, tier):
    behind = (
        [(PLENTY, PLENTY), (20_600_000, 250_000), (20_450_000, 100_000), (2_000_000, PLENTY)]
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
    slow, names = Machine(probed=True, overhead_ram=0, allocator_slack=0.0, disk_bandwidth=1e5), ["int8", "offload"]
    exact = planned(machine=slow)
    cap = exact.predicted_bytes("ram") - 100_000
    streamed, near = planned(ram=cap, machine=slow, names=names), planned(ram=cap, quality="near", machine=slow, names=names)
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


def test_a_shape_needs_the_disk_that_its_real_folder_needs():
    """The experts of Mixtral are joined when they are loaded, so what streams is written once; they are 86 GiB of bfloat16."""
    shape = describe("mixtral-8x7b")
    machine = Machine(probed=True)
    with pytest.raises(DoesNotFit):
        planned(model=shape, ram=16 * GIB, disk=GIB, names=["offload"], machine=machine)
    plan = planned(model=shape, ram=16 * GIB, names=["offload"], machine=machine)
    assert plan.predicted["disk"]["weights"] == plan.streamed_bytes > 70 * GIB
    assert plan.phases["load"]["workspace"] >= 8 * 4096 * 2 * 14336 * 2, "the parts of all experts' `gate_up_proj`"


def test_a_plan_and_its_run_agree_on_where_random_weights_stream_from(tmp_path, monkeypatch):
    """Of a folder with a config alone: the run makes blocks up and writes those that stream, and the plan counts them."""
    make("llama", torch.bfloat16).config.save_pretrained(tmp_path)
    written = []
    monkeypatch.setenv("TIGHTFIT_SPILL", str(tmp_path))
    write = spill.write_image
    monkeypatch.setattr(spill, "write_image", lambda block, *rest: written.append(block) or write(block, *rest))
    config_only = describe(str(tmp_path), random_weights=True)
    whole = planned(model=config_only, names=["offload"], random_weights=True)
    plan = planned(model=config_only, ram=whole.predicted_bytes("ram") - 1, names=["offload"], random_weights=True)
    with build(plan, config_only) as built:
        assert [path for path, block in blocks_of(built.model) if block in written] == [
            f"model.layers.{position}" for position in plan.techniques["offload"]["streamed"]
        ]
    sizes = [sum(tensor.nbytes for tensor in block.parameters()) for _, block in blocks_of(make("llama", torch.bfloat16))]
    assert plan.predicted["disk"]["weights"] == sum(sizes[position] for position in plan.techniques["offload"]["streamed"]) > 0


def test_a_plan_that_asks_for_no_quantization_loads_no_library_for_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "tightfit.formats.nf4", None)  # importing it raises
    kind = catalog.technique("nf4")
    available = {"nf4": kind, "int8": catalog.technique("int8"), "offload": catalog.technique("offload")}
    request = Request(skeleton(), GENERATE, Budget(PLENTY), "exact", {}, alternatives=False)
    assert choose(request, MACHINE, available).techniques == {}
    assert kind(layout="packed").settled("cpu").layout == "packed"
    assert kind().settled("cuda").layout == "standard"
    with pytest.raises(ImportError):
        kind().settled("cpu")


def test_a_library_that_trying_loads_is_counted_whatever_is_taken():
    """`run --quality near` rehearses `nf4` in the very process that then runs `int8`."""
    machine = Machine(probed=True, overhead_ram=0, overhead_bitsandbytes=7_000_000, allocator_slack=0.0)
    held = {
        quality: planned(quality=quality, machine=machine, asked=asked).predicted["ram"]["overhead"]
        for quality, asked in {"exact": {}, "near": {}, "small": {"int8": {}}}.items()
    }
    assert held == {"exact": 0, "near": 7_000_000, "small": 0}


def test_slots_that_are_asked_for_are_taken_and_blocks_are_not():
    cap = planned().predicted_bytes("ram") - 1
    two, three = (planned(ram=cap, asked={"offload": {"slots": slots}}).techniques["offload"] for slots in (2, 3))
    assert (two["slots"], three["slots"]) == (2, 3)
    assert len(three["streamed"]) == len(two["streamed"]) + 1, "a slot takes the place of a block"
    assert planned(asked={"offload": {}}).techniques == {}, "all of it fits"
    for wrong, said in (({"streamed": (0,)}, "planner's to choose"), ({"slots": 1}, "at least 2")):
        with pytest.raises(TightfitError, match=said) as caught:
            planned(asked={"offload": wrong})
        assert caught.value.hint
