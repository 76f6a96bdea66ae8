"""Pace: seconds worked out by hand from round numbers."""

from dataclasses import replace

import pytest

from tightfit.planner.pace import load_seconds, pace, transfer_seconds
from tightfit.planner.residency import Residency
from tightfit.planner.weigh import Weights
from tightfit.terms.budget import Budget
from tightfit.terms.footprint import Footprint
from tightfit.terms.machine import Machine
from tightfit.terms.workload import Workload

MACHINE = Machine(
    flops=100.0, memory_bandwidth=10.0, gpu_flops=1000.0, gpu_bandwidth=100.0, disk_bandwidth=2.0, link_bandwidth=4.0, operation_seconds=0.5
)
WEIGHTS = Weights(
    blocks=(20, 20, 30, 30),
    outside=60,
    stored=160,
    changed=False,
    take_turns=True,
    read_scratch=0,
    encode_scratch=0,
    passing=0,
    staging=0,
    records=0,
    extras=frozenset(),
)
CPU, GPU = Budget(ram=1000), Budget(ram=1000, gpu=1000)
ALL = Residency(("ram",) * 4, (), 0, 0, 100, 100)
HALF = Residency(("ram", "disk", "ram", "disk"), (1, 3), 2, 30, 110, 80)


def work(flops: float, bytes_touched: float, operations: int) -> dict[str, float]:
    return {"flops": flops, "bytes_touched": bytes_touched, "operations": operations}


PREFILL, DECODE = work(1000, 40, 4), work(50, 40, 2)  # on the CPU: max(10, 4) + 2 = 12 s, max(0.5, 4) + 1 = 5 s
GENERATE = Footprint({}, {"prefill": PREFILL, "decode": DECODE})


def seconds(
    residency: Residency, workload: Workload, footprint: Footprint = GENERATE, budget: Budget = CPU
) -> tuple[dict[str, float], float]:
    found = pace(footprint, WEIGHTS, residency, workload, budget, MACHINE)
    return dict(found.seconds), found.whole


def test_resident_generation_is_computing():
    told, whole = seconds(ALL, Workload("generate", 1, 8, 5))
    assert told == {"load": 80.0, "prefill": 12.0, "token": 5.0, "stream": 0.0}  # load: 160 bytes at 2 a second
    assert whole == 12 + 4 * 5  # the first token comes out of the prompt's pass


def test_streaming_sets_the_pace_where_it_is_slower():
    told, whole = seconds(HALF, Workload("generate", 1, 8, 5))
    assert told["stream"] == 25.0  # 20 + 30 bytes at 2 a second
    assert (told["prefill"], told["token"]) == (25.0, 25.0)
    assert whole == 25 + 4 * 25


def test_streaming_hides_where_computing_is_slower():
    footprint = Footprint({}, {"prefill": work(10_000, 0, 0), "decode": work(3000, 0, 0)})
    told, whole = seconds(HALF, Workload("generate", 1, 8, 5), footprint)
    assert (told["prefill"], told["token"]) == (100.0, 30.0)
    assert whole == 100 + 4 * 30


def test_an_encoder_counts_with_the_prompt():
    footprint = Footprint({}, {"encoder": work(500, 0, 0), "prefill": PREFILL, "decode": DECODE})
    assert seconds(ALL, Workload("generate", 1, 8, 1), footprint)[1] == 5 + 12


def test_phases_of_one_stem_are_added_before_the_slower_rate_is_taken():
    footprint = Footprint({}, {"prefill": work(1000, 0, 0), "prefill: blocks": work(0, 60, 0), "decode": DECODE})
    assert seconds(ALL, Workload("generate", 1, 8, 1), footprint)[0]["prefill"] == 10.0


def test_a_training_step_moves_its_blocks_twice():
    footprint = Footprint({}, {"forward": work(1000, 0, 0), "backward": work(2000, 0, 0)})
    assert seconds(ALL, Workload("tune"), footprint) == ({"load": 80.0, "step": 30.0, "stream": 0.0}, 30.0)
    assert seconds(HALF, Workload("tune"), footprint) == ({"load": 55.0, "step": 50.0, "stream": 25.0}, 50.0)


def test_loading_leaves_in_their_files_the_blocks_that_stream_from_there():
    assert seconds(HALF, Workload("embed"))[0]["load"] == (160 - 50) / 2
    behind = replace(HALF, homes=("gpu", "ram", "gpu", "disk"))
    assert seconds(behind, Workload("embed"), budget=GPU)[0]["load"] == (160 - 30) / 2, "what rests in RAM is read"


def test_loading_reads_encodes_and_writes_what_rests_on_disk_in_another_form():
    changed = replace(WEIGHTS, blocks=(10, 10, 15, 15), changed=True)
    machine = replace(MACHINE, encode_bandwidth={"eight": 32.0, "two": 1.0})
    assert load_seconds(changed, HALF, "ram", machine, ["eight"]) == (160 + 25) / 2 + 160 / 32
    assert load_seconds(changed, ALL, "ram", machine, ["eight"]) == 160 / 2 + 160 / 32
    assert load_seconds(changed, replace(HALF, homes=("gpu", "ram", "gpu", "disk")), "gpu", machine, ["eight"]) == (160 + 15) / 2


def test_what_goes_on_side_by_side_is_told_for_what_is_done_most_often():
    def sides(workload: Workload, footprint: Footprint) -> tuple[float, float]:
        found = pace(footprint, WEIGHTS, HALF, workload, CPU, MACHINE)
        return found.compute, found.transfer

    assert sides(Workload("generate", 1, 8, 5), GENERATE) == (5.0, 25.0)
    assert sides(Workload("generate", 1, 8, 1), GENERATE) == (12.0, 25.0), "a single token comes out of the prompt's pass"
    assert sides(Workload("tune"), Footprint({}, {"forward": work(4000, 0, 0)})) == (40.0, 50.0)
    assert sides(Workload("embed"), Footprint({}, {"forward": work(4000, 0, 0)})) == (40.0, 25.0)


def test_embedding_is_one_pass():
    assert seconds(HALF, Workload("embed"), Footprint({}, {"forward": work(1000, 0, 0)}))[1] == 25.0


def test_a_gpu_has_rates_of_its_own():
    told, _ = seconds(replace(ALL, homes=("gpu",) * 4), Workload("generate", 1, 8, 5), budget=GPU)
    assert (told["prefill"], told["token"]) == (1 + 2, 0.4 + 1)  # max(1, 0.4) + 4·0.5 and max(0.05, 0.4) + 2·0.5


@pytest.mark.parametrize(
    ("homes", "expected"),
    [
        (("gpu", "ram", "gpu", "ram"), 50 / 4),  # link only
        (("gpu", "disk", "gpu", "disk"), 50 / 2),  # the disk is slower than the link
        (("gpu", "ram", "gpu", "disk"), max(30 / 2, 50 / 4)),  # side by side: the link carries both
        (("gpu", "disk", "gpu", "ram"), max(20 / 2, 50 / 4)),
    ],
)
def test_disk_and_link_work_side_by_side(homes, expected):
    assert transfer_seconds(WEIGHTS, replace(HALF, homes=homes), "gpu", MACHINE) == expected


def test_a_cpu_moves_nothing_over_the_link():
    assert transfer_seconds(WEIGHTS, HALF, "ram", MACHINE) == 25.0
    assert transfer_seconds(WEIGHTS, ALL, "ram", MACHINE) == 0.0
