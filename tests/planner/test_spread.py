"""Spread: blocks over several GPUs, where that is faster or the only way; each GPU's bytes against a rehearsal of its own blocks."""

import itertools
import random
import re
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from families import CONFIGS, make
from planning import GENERATE, MACHINE, PLENTY, TUNE, planned
from transformers import AutoConfig, Gemma2ForCausalLM, LlamaForCausalLM

from tightfit import steps
from tightfit.describe.blocks import block_lists, blocks_of
from tightfit.describe.skeleton import meta_copy
from tightfit.describe.source import describe
from tightfit.planner.spread import cache_bytes, changes_of, place_blocks
from tightfit.rehearse.rehearsal import rehearse
from tightfit.rehearse.thin import thinned
from tightfit.terms.errors import DoesNotFit, TightfitError
from tightfit.terms.footprint import total
from tightfit.terms.workload import Workload

EMBED = Workload("embed", 2, 64)
ONLY = ["offload"]
SLOW = replace(MACHINE, link_bandwidth=1e7)
"""Streaming is no answer here: a block takes longer over the link than to run."""


@cache
def deep():
    """Twelve blocks of the `llama` of the families."""
    cls, model_type, values = CONFIGS["llama"]
    config = AutoConfig.for_model(model_type, **{**values, "num_hidden_layers": 12}, architectures=[cls])
    return replace(describe(LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)), name="deep")


def chosen(gpu, gpus=1, workload=GENERATE, names=ONLY, **more):
    return planned(workload, gpu=gpu, gpus=gpus, names=names, **{"model": deep(), "machine": SLOW, **more})


def cap(workload=GENERATE, share=1.0):
    """A GPU that can hold so many times the weights and the cache, and all that is there beside them."""
    tensors = dict(chosen(PLENTY, workload=workload).predicted["gpu"])
    lasting = tensors["weights"] + tensors.get("kv_cache", 0)
    beside = total(tensors) - tensors["overhead"] - lasting
    return MACHINE.overhead_gpu + int((beside + share * lasting) * (1 + MACHINE.allocator_slack)) + 2


@pytest.mark.parametrize("workload", [GENERATE, EMBED], ids=lambda work: work.task)
@pytest.mark.parametrize(("share", "gpus"), [(0.95, 2), (0.7, 4), (0.3, 8)])
def test_every_block_is_on_a_gpu_and_every_gpu_keeps_to_its_cap(workload, share, gpus):
    plan, alone = chosen(cap(workload, share), gpus, workload), chosen(PLENTY, workload=workload)
    assert plan.residency == ("gpu",) * 12 and not plan.techniques and plan.streamed_bytes == 0
    assert len(plan.devices) == 12 and set(plan.devices) <= set(range(gpus)) and list(plan.devices) == sorted(plan.devices)
    assert all(total(parts) <= plan.budget.gpu for parts in plan.predicted_gpus)
    assert sum(parts["weights"] for parts in plan.predicted_gpus) == alone.predicted["gpu"]["weights"]
    assert sum(parts.get("kv_cache", 0) for parts in plan.predicted_gpus) == alone.predicted["gpu"].get("kv_cache", 0)
    assert plan.predicted["gpu"] == max(plan.predicted_gpus, key=total) == plan.predicted_gpus[plan.fullest_gpu]
    assert max(total(parts) for name, parts in plan.phases.items() if name != "load") == plan.tensor_bytes()


@pytest.mark.parametrize("workload", [GENERATE, EMBED], ids=lambda work: work.task)
def test_a_gpu_holds_what_a_rehearsal_of_its_own_blocks_holds(workload):
    """The reference knows nothing of shares: a model that has no other blocks is rehearsed."""
    plan, live = chosen(cap(workload, 0.4), 4, workload), deep().live
    blocks = [sum(one.nbytes for one in block.parameters()) for _, block in blocks_of(live)]
    outside = sum(one.nbytes for one in (*live.parameters(), *live.buffers())) - sum(blocks)
    assert len(plan.predicted_gpus) == 3
    for number, parts in enumerate(plan.predicted_gpus):
        mine = {position for position, device in enumerate(plan.devices) if device == number}
        phases = rehearse(partial(thinned, deep().meta_model(), [mine]), workload).phases
        beside = [total(sizes) - sizes["weights"] for name, sizes in phases.items() if number == 0 or ": stack " in name]
        assert parts["weights"] == sum(blocks[position] for position in mine) + (0 if number else outside)
        assert total(parts) - parts["weights"] - parts["overhead"] == max(beside)


def test_where_one_gpu_suffices_the_plan_is_that_of_one():
    one, several = chosen(cap()), chosen(cap(), 4)
    assert several.devices == () and several.predicted == one.predicted and several.seconds == one.seconds
    assert several.notes == (*one.notes, "one GPU holds all blocks: more would not be faster")


def test_where_all_gpus_are_too_small_one_streams_and_the_plan_says_so():
    one, several, more = (chosen(cap(share=0.45), gpus) for gpus in (1, 2, 3))
    assert one.techniques.keys() == {"offload"} and len(set(more.devices)) == 3
    assert (several.devices, several.techniques, several.predicted) == ((), one.techniques, one.predicted)
    assert re.fullmatch(r"2 GPUs together hold [\d.]+ .iB of the [\d.]+ MiB that all blocks need: one streams them", several.notes[-1])


def test_where_streaming_hides_behind_compute_one_gpu_is_used():
    one, several = (chosen(cap(share=0.7), gpus, machine=replace(SLOW, link_bandwidth=1e13)) for gpus in (1, 2))
    assert several.devices == () and several.techniques == one.techniques and one.streamed_bytes
    assert several.notes[-1] == "one GPU is used: blocks on several would not be faster"


def test_spreading_is_told_and_is_faster_than_streaming():
    plan, alone = chosen(cap(share=0.7), 2), chosen(cap(share=0.7))
    counts = [plan.devices.count(number) for number in (0, 1)]
    whole, by_one = (each.seconds["prefill"] + (GENERATE.new_tokens - 1) * each.seconds["token"] for each in (plan, alone))
    assert plan.seconds["token"] < alone.seconds["token"]
    where = f"all 12 blocks stay on 2 GPUs ({counts[0]} on gpu 0, {counts[1]} on gpu 1)"
    assert plan.reasons[0] == f"{where}; one GPU alone would take {by_one / whole:.1f}x the time"
    assert plan.reasons[1] == "hidden states change the GPU 2 times in a pass"


@pytest.mark.parametrize(
    ("workload", "tokens"), [(GENERATE, {"prefill": 48, "token": 1}), (EMBED, {"step": 128})], ids=["generate", "embed"]
)
def test_the_way_between_gpus_takes_time(workload, tokens):
    resident, plan = chosen(PLENTY, workload=workload), chosen(cap(workload, 0.7), 2, workload)
    assert plan.devices
    for name, count in tokens.items():
        took = SLOW.operation_seconds + count * 64 * 2 / SLOW.link_bandwidth
        assert plan.seconds[name] == pytest.approx(resident.seconds[name] + 2 * took)


def test_where_nothing_can_stream_several_are_the_only_way():
    """Made-up weights would stream from a spill file, and RAM and disk have no room for them."""
    tight = {"random_weights": True, "ram": MACHINE.overhead_ram + 20_000_000, "disk": 1}
    with pytest.raises(DoesNotFit, match="on disk"):
        chosen(cap(share=0.7), 1, **tight | {"ram": MACHINE.overhead_ram + 17_000_000})
    plan = chosen(cap(share=0.7), 2, **tight | {"ram": MACHINE.overhead_ram + 17_000_000})
    assert plan.devices and plan.reasons[0].endswith("; one GPU alone has no room")


def test_wished_quality_is_kept():
    plan = chosen(cap(share=0.7), 2, names=["offload", "int8"])
    assert plan.quality == "exact" and plan.devices and not plan.techniques


def test_adapters_lie_with_their_blocks():
    asked = {"lora": {"rank": 4}}
    plan = chosen(cap(share=0.7), 2, names=["offload", "lora"], asked=asked)
    alone = chosen(PLENTY, names=["offload", "lora"], asked=asked)
    bare = sum(one.nbytes for one in blocks_of(deep().live)[0][1].parameters())
    assert sum(parts["weights"] for parts in plan.predicted_gpus) == alone.predicted["gpu"]["weights"]
    assert plan.predicted_gpus[1]["weights"] > plan.devices.count(1) * bare


def test_a_network_beside_the_blocks_stays_on_one_gpu():
    plan = chosen(cap(share=0.9), 2, names=["offload", "side"], asked={"side": {}})
    assert not plan.devices and plan.notes[-1] == "one GPU is used: the blocks of this model do not work on several"


def test_tuning_on_several_is_refused():
    with pytest.raises(TightfitError, match="tuning uses one GPU, and the budget has 2") as caught:
        planned(TUNE, gpu=PLENTY, gpus=2)
    assert "accelerate launch" in caught.value.hint


@pytest.mark.parametrize("family", ["llama", "bloom", "t5"])
def test_what_blocks_keep_adds_up_to_the_cache(family):
    model, work = make(family), Workload("generate", 2, 40, 9)
    kept = cache_bytes(meta_copy(model), work)
    whole = rehearse(partial(meta_copy, model), work).phases
    for stem in ("prefill", "decode"):
        assert len(kept[stem]) == len(blocks_of(model))
        most = max(sizes.get("kv_cache", 0) for name, sizes in whole.items() if name.startswith(stem))
        assert 0 < most <= sum(kept[stem]) <= most * 1.01


def test_blocks_that_look_back_less_keep_less():
    """Against a real run: Gemma's blocks take turns in looking at all, and at a window of 16 tokens."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma2", **shape, num_key_value_heads=1, head_dim=16, sliding_window=16)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        held = steps.new_cache(model)
        token = steps.prefill(model, torch.zeros(1, 30, dtype=torch.long), held)
        for _ in range(9):
            token = steps.decode(model, token, held)
    real = [layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes() for layer in held.layers]
    kept = cache_bytes(meta_copy(model), Workload("generate", 1, 30, 10))
    assert real[0] < real[1] and kept["decode"] == real
    assert kept["prefill"] == [30 * 2 * 16 * 4] * 4, "what a window cuts off is still there: a slice keeps the whole"


def test_encoders_keep_nothing():
    kept = cache_bytes(make("t5").to("meta"), Workload("generate", 1, 40, 9))
    assert all(sizes[:4] == [0] * 4 for sizes in kept.values())
    assert min(kept["prefill"][4:]) > 0 and min(kept["decode"][4:]) > 0


def test_blocks_fit_and_change_gpus_no_more_than_neighbours_must():
    """Against every way to cut small chains into neighbours; some need a way back to GPU 0."""
    drawn = random.Random(0)
    fitted = 0
    for _ in range(60):
        sizes = [drawn.randint(1, 9) for _ in range(drawn.randint(1, 6))]
        gpus, other = drawn.randint(2, 4), drawn.randint(5, 25)
        first = other - drawn.randint(0, 12)
        found = place_blocks(sizes, first, other, gpus, 0.5)
        least = least_changes(sizes, first, other, gpus)
        if found is None:
            assert least is None, (sizes, first, other, gpus)
            continue
        fitted += 1
        for number in set(found):
            assert sum(size for size, device in zip(sizes, found, strict=True) if device == number) <= (other if number else first)
        assert least is None or changes_of(found, [len(sizes)])[0] <= least, (sizes, first, other, gpus, found)
    assert 20 < fitted < 56


def least_changes(sizes, first, other, gpus):
    """Of all ways to cut the chain into one piece for each GPU in turn, some of them empty."""
    ways = []
    for cuts in itertools.combinations_with_replacement(range(len(sizes) + 1), gpus - 1):
        ends = (0, *cuts, len(sizes))
        pieces = [sizes[begin:end] for begin, end in itertools.pairwise(ends)]
        if sum(pieces[0]) <= first and all(sum(piece) <= other for piece in pieces[1:]):
            devices = [number for number, piece in enumerate(pieces) for _ in piece]
            ways.append(changes_of(devices, [len(sizes)])[0])
    return min(ways, default=None)


@pytest.mark.parametrize(("gpus", "size", "used"), [(4, 48, 3), (2, 48, 0)])
def test_a_model_of_70_billion_weights(gpus, size, used):
    """131 GiB; no weight is there."""
    plan = planned(GENERATE, 1 << 36, size << 30, names=ONLY, model=_big(), gpus=gpus)
    assert len(plan.predicted_gpus) == used and len(set(plan.devices)) == used
    assert all(total(parts) <= size << 30 for parts in plan.predicted_gpus)
    assert ("offload" in plan.techniques) == (not used)
    if not used:
        assert "2 GPUs together hold" in plan.notes[-1]


@cache
def _big():
    return describe("llama-3.1-70b", fetch=False)


def test_stacks_begin_and_end_on_gpu_0():
    assert changes_of([0, 1, 1, 2], [4]) == [3]
    assert changes_of([0, 0, 0, 1, 1, 1], [3, 3]) == [0, 2]
    assert changes_of([1, 1, 0, 1], [2, 2]) == [2, 2]
    assert len(block_lists(make("t5"))) == 2
