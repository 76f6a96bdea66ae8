"""Graphs: orders, readers, groups, and what is refused."""

import pytest

from tightfit.terms.errors import TightfitError
from tightfit.terms.graph import Graph, Operator


def diamond(**costs: float) -> Graph:
    operators = tuple(Operator(name, 1.0, group=group, **costs) for name, group in zip("abcd", ("", "x", "", "x"), strict=True))  # type: ignore[arg-type]
    return Graph("diamond", operators, ((0, 1), (0, 2), (1, 3), (2, 3), (0, 1)))


def test_readers_stand_once_and_after_what_they_read() -> None:
    graph = diamond()
    assert graph.children == ((1, 2), (3,), (3,), ())
    assert graph.parents == ((), (0,), (0,), (1, 2))
    assert graph.order == (0, 1, 2, 3)


def test_groups_hold_each_operator_once() -> None:
    assert diamond().groups == ((0,), (1, 3), (2,))


def test_sums() -> None:
    assert diamond(weight_bytes=5).weight_bytes == 20
    assert diamond().seconds == 4.0


def test_a_circle_is_named() -> None:
    operators = tuple(Operator(name, 1.0) for name in "abcd")
    with pytest.raises(TightfitError, match=r"circle through `[bcd]`, `[bcd]`, `[bcd]`$"):
        Graph("loop", operators, ((0, 1), (1, 2), (2, 3), (3, 1)))


def test_an_edge_to_nowhere_is_refused() -> None:
    with pytest.raises(TightfitError, match="edge 0 → 7, and 1 operators"):
        Graph("g", (Operator("a", 1.0),), ((0, 7),))


@pytest.mark.parametrize("costs", [{"seconds": -1.0}, {"seconds": float("nan")}, {"seconds": 1.0, "weight_bytes": -5}])
def test_costs_are_zero_or_more(costs: dict[str, float]) -> None:
    with pytest.raises(TightfitError, match=r"the operator `a` has (seconds|weight_bytes) of (-1|nan|-5)"):
        Graph("g", (Operator("a", **costs),), ())  # type: ignore[arg-type]


def test_no_operators() -> None:
    with pytest.raises(TightfitError, match="has no operators"):
        Graph("g", (), ())
