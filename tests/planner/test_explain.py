"""Explain: which side sets the pace, and refusals whose hints name every tier that is too small. Outcomes by hand."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest

from tightfit.contracts import Quality, Stage
from tightfit.planner.candidates import Candidate
from tightfit.planner.explain import lacking, reasons, refusal
from tightfit.planner.outcome import Outcome, Request
from tightfit.planner.pace import Pace
from tightfit.planner.residency import Residency
from tightfit.terms.budget import Budget
from tightfit.terms.footprint import Footprint
from tightfit.terms.units import GIB, MIB
from tightfit.terms.workload import Workload

HALF = Residency(("ram", "disk", "ram", "disk"), (1, 3), 2, 30, 110, 80)
FOOTPRINT = Footprint({"forward": {"weights": 5}})


@dataclass(frozen=True)
class Four:
    stage: ClassVar[Stage] = Stage.QUANTIZE
    quality: ClassVar[Quality] = "near"


STORED, FOUR = Candidate({}), Candidate({"four": Four()})


def asking(ram: int, gpu: int = 0, disk: int = 0, quality: Quality = "exact", task: str = "generate") -> Request:
    return Request(SimpleNamespace(name="m"), Workload(task), Budget(ram, gpu, disk), quality)  # only its name is read


def outcome(candidate: Candidate = STORED, residency=None, compute: float = 1.0, transfer: float = 1.0, **needed: int) -> Outcome:
    parts = {tier: {"weights": size} for tier, size in needed.items()}
    pace = Pace({"stream": 10.0, "step": max(compute, transfer)}, 1.0, compute, transfer)
    return Outcome(candidate, Workload(), FOOTPRINT, None, residency, parts, parts, pace)


@pytest.mark.parametrize(
    ("compute", "transfer", "word"), [(19.0, 20.0, "sets the pace"), (20.0, 20.0, "sets the pace"), (21.0, 20.0, "hides behind compute")]
)
def test_the_slower_side_sets_the_pace(compute, transfer, word):
    """A pass takes 10 s, and a training step makes two of them: 19 s of computing do not hide 20 s of reading."""
    lines = reasons(asking(500, task="tune"), outcome(residency=HALF, compute=compute, transfer=transfer))
    assert lines[0] == "2 of 4 blocks stay on ram; 2 from disk stream through 2 slots"
    assert lines[1] == f"a pass moves its blocks in 10.00 s: the transfer {word}"


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        ({"ram": 101}, ["ram"]),
        ({"ram": 100, "disk": 51}, ["disk"]),
        ({"ram": 101, "disk": 51}, ["ram", "disk"]),
        ({"ram": 100, "disk": 50}, ["ram"]),  # bytes were rounded
    ],
)
def test_every_tier_that_is_too_small_lacks(needed, expected):
    assert lacking(asking(100, disk=50), outcome(**needed)) == expected


def test_the_gpu_lacks_before_what_is_behind_it():
    assert lacking(asking(100, gpu=10, disk=50), outcome(gpu=11, ram=101, disk=51)) == ["gpu", "ram", "disk"]


def test_a_hint_names_every_tier_that_is_too_small():
    error = refusal(asking(2 * GIB, disk=GIB), [outcome(ram=3 * GIB, disk=35 * GIB)])
    assert str(error) == "`m` needs 3.00 GiB on ram to write text; the budget is 2.00 GiB"
    assert error.hint == "`--ram 3.01GiB --disk 35.04GiB` is enough"


def test_the_least_is_said_where_one_tier_is_too_small():
    assert refusal(asking(GIB), [outcome(ram=2000 * MIB)]).hint == "`--ram 1.96GiB` is the least that works"
    error = refusal(asking(4 * GIB), [outcome(ram=3 * GIB, disk=100 * MIB)])
    assert (str(error), error.hint) == (
        "`m` needs 100.0 MiB on disk to write text; the budget is 0 B",
        "`--disk 100.1MiB` is the least that works",
    )


def test_the_way_that_misses_fewest_bytes_is_named_with_its_quality():
    few = outcome(FOUR, ram=2 * GIB, disk=35 * GIB)
    assert refusal(asking(GIB), [outcome(ram=4 * GIB), few]).hint == "`--ram 4.01GiB` is the least that works"
    few = outcome(FOUR, ram=2 * GIB, disk=GIB // 2)
    assert refusal(asking(GIB), [outcome(ram=4 * GIB), few]).hint == "`--ram 2.01GiB --disk 512.52MiB` with `--quality near` is enough"
    assert refusal(asking(GIB, quality="near"), [outcome(ram=4 * GIB), few]).hint == "`--ram 2.01GiB --disk 512.52MiB` is enough"


def test_another_quality_that_fits_is_all_that_is_said():
    fits = outcome(FOUR, residency=HALF, ram=GIB // 2)
    error = refusal(asking(GIB), [outcome(ram=4 * GIB), fits])
    assert str(error).startswith("`m` needs 4.00 GiB on ram to write text; ")
    assert error.hint == "`--quality near` lets `four` fit in 512.0 MiB"


def test_a_gpu_is_named_with_what_is_behind_it():
    """`--ram` without `--gpu` would ask for a run on the CPU."""
    assert (
        refusal(asking(GIB, gpu=8 * GIB), [outcome(gpu=4 * GIB, ram=2 * GIB)]).hint
        == "`--gpu 4.01GiB --ram 2.01GiB` is the least that works"
    )
    assert refusal(asking(GIB, gpu=GIB), [outcome(gpu=4 * GIB, ram=GIB)]).hint == "`--gpu 4.01GiB` is the least that works"


def test_what_grows_with_the_tokens_is_said():
    parts = {"ram": {"weights": GIB, "kv_cache": 2 * GIB}}
    needy = Outcome(STORED, Workload(), FOOTPRINT, None, None, parts, parts, Pace({}, 1.0, 1.0, 1.0))
    assert refusal(asking(GIB), [needy]).hint == (
        "most of it grows with the tokens: try a smaller `--context` or `--batch`, or `--ram 3.01GiB`"
    )
