"""Candidates: which sets of techniques are tried, and what a wished quality allows. Stand-ins suffice: only their words count."""

from dataclasses import dataclass, replace
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
class Adds:
    stage: ClassVar[Stage] = Stage.ADAPT
    quality: ClassVar[Quality] = "exact"


@dataclass(frozen=True)
class Turns:
    stage: ClassVar[Stage] = Stage.MOVE
    quality: ClassVar[Quality] = "exact"


AVAILABLE = {"two": Two, "eight": Eight, "again": Again, "adds": Adds, "turns": Turns}


def tried(task: str, asked: dict[str, dict[str, object]] | None = None) -> list[tuple[str, ...]]:
    return [candidate.names for candidate in candidates(Workload(task), AVAILABLE, asked or {})]


@pytest.mark.parametrize("task", ["generate", "embed"])
def test_work_without_gradients_tries_every_quantization_best_quality_first(task):
    assert tried(task) == [(), ("eight",), ("two",)]


def test_tuning_tries_recomputation_and_quantizes_nothing():
    assert tried("tune") == [(), ("again",)]


def test_tuning_what_an_adapter_adds_quantizes_the_frozen_base_too():
    asked = {"adds": {}}
    assert tried("tune", asked) == [
        ("adds",),
        ("adds", "again"),
        ("adds", "eight"),
        ("adds", "eight", "again"),
        ("adds", "two"),
        ("adds", "two", "again"),
    ]
    assert tried("tune", asked | {"eight": {}}) == [("adds", "eight"), ("adds", "eight", "again")]
    found = {candidate.names: allowed(candidate, "exact", asked) for candidate in candidates(Workload("tune"), AVAILABLE, asked)}
    assert [names for names, kept in found.items() if kept] == [("adds",), ("adds", "again")]


def test_what_was_asked_for_is_in_every_candidate():
    assert tried("generate", {"eight": {"where": "mlp"}}) == [("eight",)]
    assert tried("tune", {"eight": {}}) == [("eight",), ("eight", "again")]
    assert tried("tune", {"again": {}}) == [("again",)]
    assert tried("generate", {"again": {}}) == [("again",), ("again", "eight"), ("again", "two")]


def test_settings_reach_the_technique():
    (candidate,) = candidates(Workload("embed"), AVAILABLE, {"eight": {"where": "mlp"}})
    assert candidate.techniques == (Eight("mlp"),)
    assert candidate.settings == {"eight": {"where": "mlp"}}


def test_quality_is_the_worst_of_all():
    found = candidates(Workload("embed"), AVAILABLE, {"again": {}})
    assert [candidate.quality for candidate in found] == ["exact", "near", "small"]
    assert [candidate.recomputes() for candidate in found] == [True, True, True]
    assert not candidates(Workload("embed"), AVAILABLE, {})[0].recomputes()


def test_a_wished_quality_allows_itself_and_better():
    stored, eight, two = candidates(Workload("generate"), AVAILABLE, {})
    assert [[allowed(candidate, wished, {}) for wished in ("exact", "near", "small")] for candidate in (stored, eight, two)] == [
        [True, True, True],
        [False, True, True],
        [False, False, True],
    ]


def test_what_was_asked_for_by_name_is_allowed_whatever_the_quality():
    asked = {"two": {}}
    assert [allowed(candidate, "exact", asked) for candidate in candidates(Workload("tune"), AVAILABLE, asked)] == [True, True]


def test_asking_for_one_technique_does_not_allow_another():
    asked = {"again": {}}
    found = {candidate.names: allowed(candidate, "exact", asked) for candidate in candidates(Workload("generate"), AVAILABLE, asked)}
    assert found == {("again",): True, ("again", "eight"): False, ("again", "two"): False}


@dataclass(frozen=True)
class Depends:
    """Left to the machine until it is asked, which is remembered."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    quality: ClassVar[Quality] = "near"
    asked_for: ClassVar[list[str]] = []
    layout: str = "auto"

    def settled(self, device: str) -> "Depends":
        self.asked_for.append(device)
        return replace(self, layout=f"for {device}")


def test_only_what_is_tried_is_settled():
    Depends.asked_for.clear()
    stored, left_open = candidates(Workload("generate"), {"depends": Depends}, {})
    assert (Depends.asked_for, left_open.settings) == ([], {"depends": {}})
    assert stored.settled("cpu") == stored
    settled = left_open.settled("cuda")
    assert (Depends.asked_for, settled.settings, settled.names) == (["cuda"], {"depends": {"layout": "for cuda"}}, ("depends",))
    assert settled.techniques == (Depends("for cuda"),)
