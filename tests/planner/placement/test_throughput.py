"""Throughput: the answer keeps what it promises: memory, groups, flow, and a bound below every split."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from pipelines import cluster_of, clusters, fits, flows_one_way, graphs, least, plain_load

from tightfit.planner.placement.load import held_bytes, stages
from tightfit.planner.placement.throughput import throughput
from tightfit.terms.cluster import Cluster
from tightfit.terms.errors import DoesNotFit
from tightfit.terms.graph import Graph, Operator


@settings(deadline=None, max_examples=25)
@given(graphs(most=5), clusters())
def test_throughput_keeps_what_it_promises(graph: Graph, cluster: Cluster) -> None:
    try:
        placed = throughput(graph, cluster, seconds_limit=2.0)
    except DoesNotFit:
        return
    split = placed.placement.device_of
    assert fits(graph, cluster, split) and placed.peak_bytes == held_bytes(graph, cluster, split)
    assert placed.seconds == pytest.approx(max(plain_load(graph, cluster, split)))
    assert all(split[one] == split[other] for members in graph.groups for one, other in pairwise(members))
    one_way = placed.placement.by in ("contiguous", "one device")
    assert placed.bound_seconds <= least(graph, cluster, one_way) + 1e-9
    assert flows_one_way(graph, split) or not one_way
    assert all(placed.seconds <= value + 1e-9 for name, value in placed.tried.items() if value is not None and name != "scattered")


def test_what_cannot_fit_is_said_with_bytes() -> None:
    graph = Graph("heavy", (Operator("a", 1.0, 700, group="g"), Operator("b", 1.0, 300, group="g"), Operator("c", 1.0, 100)), ())
    with pytest.raises(DoesNotFit, match=r"holds 1\.1 KiB, and the devices together 1000 B: 100 B too little"):
        throughput(graph, cluster_of(500, 500))
    with pytest.raises(DoesNotFit, match=r"one device hold 1000 B, and the largest device 900 B"):
        throughput(graph, cluster_of(900, 900))
    with pytest.raises(DoesNotFit, match="found no split"):
        throughput(Graph("even", tuple(Operator(str(at), 1.0, 3) for at in range(3)), ()), cluster_of(5, 5), seconds_limit=1.0)


@settings(deadline=None, max_examples=15)
@given(graphs(most=5, outputs=False), clusters(most=2))
def test_scattered_is_the_best_of_all_splits_or_says_how_far(graph: Graph, cluster: Cluster) -> None:
    best = least(graph, cluster, one_way=False)
    try:
        placed = throughput(graph, cluster, seconds_limit=2.0, scattered=True)
    except DoesNotFit:
        return
    assert placed.bound_seconds - 1e-6 <= best <= placed.seconds + 1e-9
    assert fits(graph, cluster, placed.placement.device_of)


def test_a_split_that_need_not_be_contiguous_where_no_contiguous_one_fits() -> None:
    """Sizes 3, 2, 3, 2 in a chain: 5 + 5 fits only out of order."""
    operators = tuple(Operator(str(at), 1.0, size) for at, size in enumerate((3, 3, 2, 2)))
    graph = Graph("chain", operators, tuple(pairwise(range(4))))
    placed = throughput(graph, cluster_of(5, 5), seconds_limit=2.0)
    assert placed.tried["contiguous"] is None and placed.tried["one device"] is None
    assert placed.peak_bytes == (5, 5) and stages(graph, placed.placement.device_of) is None


def test_scattered_beats_contiguous_and_both_are_told() -> None:
    operators = tuple(Operator(str(at), seconds) for at, seconds in enumerate((3.0, 3.0, 2.0, 2.0)))
    graph = Graph("chain", operators, tuple(pairwise(range(4))))
    free, staged = (throughput(graph, cluster_of(1, 1), seconds_limit=1.0, scattered=scattered) for scattered in (True, False))
    assert free.seconds == free.bound_seconds == 5.0 and stages(graph, free.placement.device_of) is None
    assert staged.seconds == staged.bound_seconds == 6.0 and staged.bound_by == "optimum" and staged.tried["scattered"] == 5.0
