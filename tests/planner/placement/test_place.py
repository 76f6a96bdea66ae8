"""Place: no worse than any algorithm, inside every memory, and its bound is true: against every placement of tiny graphs."""

import random

import pytest
from hypothesis import given, settings
from placing import all_placements, draw_cluster, draw_graph, seeds

from tightfit.planner.placement.load import load
from tightfit.planner.placement.place import place
from tightfit.planner.placement.simulate import fits, simulate
from tightfit.planner.placement.starts import BAECHI
from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.errors import DoesNotFit, TightfitError
from tightfit.terms.graph import Graph, Operator


@settings(deadline=None, max_examples=25)
@given(seeds())
def test_it_fits_and_is_no_worse_than_the_three(chance: random.Random) -> None:
    graph = draw_graph(chance, 12)
    cluster = draw_cluster(chance, graph)
    try:
        placed = place(graph, cluster, seconds=0.05)
    except DoesNotFit:
        return
    step = simulate(graph, cluster, placed.placement)
    assert fits(cluster, step) and placed.seconds == step.makespan and placed.peak_bytes == step.peak_bytes
    found = [algorithm(graph, cluster) for algorithm in BAECHI.values()]
    assert all(placed.seconds <= simulate(graph, cluster, one).makespan for one in found if one)
    assert placed.bound_seconds <= placed.seconds and placed.gap >= 0


@settings(deadline=None, max_examples=15)
@given(seeds())
def test_nothing_is_below_its_bound(chance: random.Random) -> None:
    graph = draw_graph(chance, 4)
    cluster = draw_cluster(chance, graph)
    steps = [simulate(graph, cluster, one) for one in all_placements(graph, cluster)]
    fitting = [step.makespan for step in steps if fits(cluster, step)]
    try:
        placed = place(graph, cluster, seconds=0.2)
    except DoesNotFit:
        return
    assert placed.bound_seconds <= min(fitting) * (1 + 1e-9) <= placed.seconds * (1 + 2e-9)


def chain(*weights: int) -> Graph:
    operators = tuple(Operator(f"o{at}", 1.0, weight_bytes=weight, output_bytes=1) for at, weight in enumerate(weights))
    return Graph("chain", operators, tuple((at, at + 1) for at in range(len(weights) - 1)))


def test_a_chain_that_fits_on_one_device_stays_there() -> None:
    cluster = Cluster((Device("a", 100), Device("b", 100)), Link(1.0))
    placed = place(chain(10, 10, 10), cluster)
    assert placed.seconds == pytest.approx(placed.bound_seconds) == 3.0 and len(set(placed.placement.device_of)) == 1


def test_throughput_splits_what_makespan_leaves_together() -> None:
    cluster = Cluster((Device("a", 100), Device("b", 100)), Link(10.0))
    placed = place(chain(10, 10, 10, 10), cluster, "throughput", seconds=1.0)
    assert placed.seconds == max(load(chain(10, 10, 10, 10), cluster, placed.placement.device_of)) == pytest.approx(2.1)


def test_what_bytes_exclude_is_refused_with_how_many_lack() -> None:
    with pytest.raises(DoesNotFit, match="chain") as caught:
        place(chain(60, 60, 60), Cluster((Device("a", 70), Device("b", 70)), Link(1.0)))
    assert "41 B more are needed" in caught.value.hint


def test_an_objective_that_is_none_is_refused() -> None:
    with pytest.raises(TightfitError, match="no objective is called `makespam`") as caught:
        place(chain(1), Cluster((Device("a", 9),), Link(1.0)), "makespam")
    assert "`makespan`" in caught.value.hint
