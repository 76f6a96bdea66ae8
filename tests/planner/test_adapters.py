"""Adapters: what is trained is little, so the frozen base beside it may stream and be quantized while it is tuned."""

import pytest
from planning import TUNE, LowRank, planned, skeleton

from tightfit.describe.blocks import blocks_of
from tightfit.planner.choose import SLOT_SLACK
from tightfit.terms.errors import DoesNotFit
from tightfit.terms.machine import Machine

ADAPTED = {"asked": {"low_rank": {}}, "more": {"low_rank": LowRank}}
PAIRS_BYTES = 4 * 2 * (4 * 64 + 160 * 4)


def test_an_adapters_frozen_base_streams_while_it_is_tuned():
    whole = planned(TUNE, **ADAPTED, names=["offload", "recompute"])
    recomputed = planned(TUNE, **ADAPTED | {"asked": {"low_rank": {}, "recompute": {}}}, names=["offload", "recompute"])
    assert set(whole.techniques) == {"low_rank"} and whole.residency == ("ram",) * 4
    cap = recomputed.predicted_bytes("ram") - 1
    plan = planned(TUNE, ram=cap, **ADAPTED, names=["offload", "recompute"])
    assert set(plan.techniques) == {"low_rank", "recompute", "offload"}
    frozen = [sum(p.numel() * p.element_size() for p in block.parameters()) for _, block in blocks_of(skeleton().live)]
    streamed = plan.techniques["offload"]["streamed"]
    assert plan.streamed_bytes == sum(frozen[position] for position in streamed) > 0, "the pairs stay"
    assert plan.predicted["disk"]["weights"] == plan.streamed_bytes
    everything = sum(t.numel() * t.element_size() for t in [*skeleton().live.parameters(), *skeleton().live.buffers()])
    slots = plan.techniques["offload"]["slots"] * (max(frozen) + SLOT_SLACK)
    assert plan.predicted["ram"]["weights"] == everything + PAIRS_BYTES - plan.streamed_bytes + slots
    with pytest.raises(DoesNotFit):
        planned(TUNE, ram=cap, **ADAPTED, names=["offload"])  # without recomputation blocks must be there twice


def test_an_adapters_frozen_base_is_quantized_where_that_is_wished():
    machine = Machine(probed=True, overhead_ram=0, allocator_slack=0.0)
    asked = {"low_rank": {}, "recompute": {}}
    exact = planned(TUNE, **ADAPTED | {"asked": asked}, names=["recompute"], machine=machine)
    cap = exact.predicted_bytes("ram") - 50_000
    with pytest.raises(DoesNotFit) as refused:
        planned(TUNE, ram=cap, disk=0, **ADAPTED | {"asked": asked}, names=["recompute", "int8"], machine=machine)
    assert refused.value.hint.startswith("`--quality near` lets `low_rank + recompute + int8` fit")
    near = planned(TUNE, cap, disk=0, quality="near", **ADAPTED | {"asked": asked}, names=["recompute", "int8"], machine=machine)
    assert (set(near.techniques), near.quality, near.residency) == ({"low_rank", "recompute", "int8"}, "near", ("ram",) * 4)
