"""Candidates: which sets of techniques are tried, and what a wished quality allows. Stand-ins suffice: only their words count."""

from dataclasses import dataclass
from typing import ClassVar

import pytest

from tightfit.contracts import Quality, Stage
from tightfit.planner.candidates import allowed, candidates
from tightfit.terms.workload import Workload


@dataclass(frozen=True)
class Eight:
    stage: ClassVar[Stage] = Stage.QUANTIZE
    quality: ClassVar[Quality] = "near"
    where: str = ""


@dataclass(frozen=True)
class Two:
    stage: ClassVar[Stage] = Stage.QUANTIZE
    quality: ClassVar[Quality] = "small"


@dataclass(frozen=True)
class Again:
    stage: ClassVar[Stage] = Stage.RECOMPUTE
    quality: ClassVar[Quality] = "exact"


@dataclass(frozen=True)
class Turns:
    stage: ClassVar[Stage] = Stage.MOVE
    quality: ClassVar[Quality] = "exact"


AVAILABLE = {"two": Two, "eight": Eight, "again": Again, "turns": Turns}


def tried(task: str, asked: dict[str, dict[str, object]] | None = None) -> list[tuple[str, ...]]:
    return [candidate.names for candidate in candidates(Workload(task), AVAILABLE, asked or {}, "cpu")]


@pytest.mark.parametrize("task", ["generate", "embed"])
def test_work_without_gradients_tries_every_quantization_best_quality_first(task):
    assert tried(task) == [(), ("eight",), ("two",)]


def test_tuning_tries_recomputation_and_quantizes_nothing():
    assert tried("tune") == [(), ("again",)]


def test_what_was_asked_for_is_in_every_candidate():
    assert tried("generate", {"eight": {"where": "mlp"}}) == [("eight",)]
    assert tried("tune", {"eight": {}}) == [("eight",), ("eight", "again")]
    assert tried("tune", {"again": {}}) == [("again",)]
    assert tried("generate", {"again": {}}) == [("again",), ("again", "eight"), ("again", "two")]


def test_settings_reach_the_technique():
    (candidate,) = candidates(Workload("embed"), AVAILABLE, {"eight": {"where": "mlp"}}, "cpu")
    assert candidate.techniques == (Eight("mlp"),)
    assert candidate.settings == {"eight": {"where": "mlp"}}


def test_quality_is_the_worst_of_all():
    found = candidates(Workload("embed"), AVAILABLE, {"again": {}}, "cpu")
    assert [candidate.quality for candidate in found] == ["exact", "near", "small"]
    assert [candidate.recomputes() for candidate in found] == [True, True, True]
    assert not candidates(Workload("embed"), AVAILABLE, {}, "cpu")[0].recomputes()


def test_a_wished_quality_allows_itself_and_better():
    stored, eight, two = candidates(Workload("generate"), AVAILABLE, {}, "cpu")
    assert [[allowed(candidate, wished, {}) for wished in ("exact", "near", "small")] for candidate in (stored, eight, two)] == [
        [True, True, True],
        [False, True, True],
        [False, False, True],
    ]


def test_what_was_asked_for_by_name_is_allowed_whatever_the_quality():
    asked = {"two": {}}
    assert [allowed(candidate, "exact", asked) for candidate in candidates(Workload("tune"), AVAILABLE, asked, "cpu")] == [True, True]


def test_asking_for_one_technique_does_not_allow_another():
    asked = {"again": {}}
    found = {candidate.names: allowed(candidate, "exact", asked) for candidate in candidates(Workload("generate"), AVAILABLE, asked, "cpu")}
    assert found == {("again",): True, ("again", "eight"): False, ("again", "two"): False}
