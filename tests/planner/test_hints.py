"""Hints: whoever types what a refusal says, word by word, gets a plan."""

import re

import pytest
from planning import GENERATE, MACHINE, PLENTY, TUNE, planned

from tightfit.describe.source import describe
from tightfit.terms.errors import DoesNotFit
from tightfit.terms.machine import Machine
from tightfit.terms.units import GIB, MIB, parse_size
from tightfit.terms.workload import Workload


def follow(error: DoesNotFit, said: dict[str, object]) -> dict[str, object]:
    """What was said, and what the hint says instead, word by word."""
    told = dict(re.findall(r"--(\w+) ([\w.]+)", error.hint))
    assert told and set(told) <= {"ram", "gpu", "quality", "disk"}, error.hint
    return said | {name: value if name == "quality" else parse_size(value) for name, value in told.items()}


@pytest.mark.parametrize("workload", [GENERATE, Workload("embed", 4, 128), TUNE], ids=str)
@pytest.mark.parametrize("quality", ["exact", "near"])
@pytest.mark.parametrize("tier", ["ram", "gpu"])
def test_every_refusals_hint_gives_a_plan(workload, quality, tier):
    refusals = 0
    fixed = MACHINE.overhead_gpu if tier == "gpu" else MACHINE.overhead_ram
    behind = [(0, 0), (PLENTY, 0), (21_000_000, 0), (20_000_000, 90_000)] if tier == "gpu" else [(0, 0), (0, 90_000)]
    for room in (-900_000, 0, 50_000, 200_000, 300_000):
        for ram, disk in behind:
            said = {"ram": ram, "disk": disk, tier: fixed + room, "quality": quality}
            try:
                planned(workload, **said)
            except DoesNotFit as refused:
                refusals += 1
                said = follow(refused, said)
                plan = planned(workload, **said)
                assert all(plan.predicted_bytes(held) <= said[held] for held in plan.predicted)
    assert refusals >= 2 * len(behind)


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("llama-2-70b", {"ram": 2 * GIB, "disk": GIB, "quality": "near"}),
        ("llama-2-70b", {"ram": 1 * GIB, "disk": 0, "quality": "exact"}),
        ("llama-2-70b", {"ram": 3 * GIB, "disk": GIB, "gpu": 2 * GIB, "quality": "near"}),
        ("mixtral-8x7b", {"ram": 16 * GIB, "disk": GIB, "quality": "exact"}),
        ("mixtral-8x7b", {"ram": 4 * GIB, "disk": GIB, "quality": "near"}),
        ("mixtral-8x7b", {"ram": 2 * GIB, "disk": GIB, "gpu": 4 * GIB, "quality": "near"}),
    ],
)
def test_every_refusals_hint_gives_a_plan_for_large_models(preset, said):
    machine = Machine(probed=True, overhead_ram=480 * MIB, overhead_gpu=600 * MIB, overhead_bitsandbytes=50 * MIB)
    with pytest.raises(DoesNotFit) as refused:
        planned(model=describe(preset), machine=machine, **said)
    followed = follow(refused.value, said)
    plan = planned(model=describe(preset), machine=machine, **followed)
    assert all(plan.predicted_bytes(held) <= followed[held] for held in plan.predicted)
