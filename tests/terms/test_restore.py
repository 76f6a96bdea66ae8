"""Restore: every kind of field that the words have, right and wrong."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from tightfit.terms.restore import restore


@dataclass(frozen=True)
class Leaf:
    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Tree:
    kind: Literal["oak", "elm"]
    leaves: tuple[Leaf, ...]
    counts: Mapping[str, int]
    alive: bool = True
    notes: Any = None


def test_nested_values_are_restored():
    values = {"kind": "elm", "leaves": [{"name": "a"}, {"name": "b", "weight": 2}], "counts": {"x": 3}, "notes": [1, [2]], "extra": 0}
    assert restore(Tree, values) == Tree("elm", (Leaf("a"), Leaf("b", 2)), {"x": 3}, notes=(1, (2,)))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "ash"},
        {"kind": None},
        {"leaves": "ab"},
        {"leaves": [{}]},
        {"leaves": {"name": "a"}},
        {"counts": {"x": 3.0}},
        {"counts": {"x": True}},
        {"alive": 1},
        {"leaves": [{"name": "a", "weight": float("inf")}]},
        {"leaves": [{"name": "a", "weight": True}]},
        {"counts": {1: 1}},
    ],
)
def test_what_is_of_another_kind_is_refused(change):
    with pytest.raises(TypeError):
        restore(Tree, {"kind": "elm", "leaves": [], "counts": {}} | change)


@pytest.mark.parametrize("value", [None, 5, "x", [], {}])
def test_what_is_no_object_is_refused(value):
    with pytest.raises(TypeError):
        restore(Tree, value)
