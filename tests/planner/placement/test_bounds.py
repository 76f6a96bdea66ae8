"""Bounds: true against every placement of tiny graphs, sharp where they should be, and clear when nothing can fit."""

import random as rolls

import pytest
from hypothesis import given, settings
from placing import all_placements, draw_cluster, draw_graph, seeds

from tightfit.planner.placement.bounds import bound, least_memory, lower_bounds
from tightfit.planner.placement.heft import heft
from tightfit.planner.placement.m_etf import m_etf
from tightfit.planner.placement.moments import moments
from tightfit.planner.placement.pack import by_operator
from tightfit.planner.placement.paths import least_cut_seconds, longest_path
from tightfit.planner.placement.simulate import fits, simulate
from tightfit.planner.placement.times import times
from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.errors import DoesNotFit
from tightfit.terms.graph import Graph, Operator
from tightfit.terms.placement import Placement


def devices(count: int, room: int = 1000, rate: float = 1.0) -> Cluster:
    return Cluster(tuple(Device(f"d{at}", room) for at in range(count)), Link(rate))


@given(seeds())
@settings(deadline=None, max_examples=120)
def test_no_placement_of_all_is_below(random):
    graph = draw_graph(random, 5)
    cluster = draw_cluster(random, graph)
    steps = [simulate(graph, cluster, placement) for placement in all_placements(graph, cluster)]
    best = min((step.makespan for step in steps if fits(cluster, step)), default=None)
    try:
        least_memory(graph, cluster)
    except DoesNotFit:
        assert best is None
    if best is not None:
        assert all(seconds <= best + 1e-9 for seconds in lower_bounds(graph, cluster).values())


@given(seeds())
@settings(deadline=None, max_examples=250)
def test_no_placement_that_is_found_is_below(random):
    """Deeper graphs than can be looked at in all their placements, mostly on one device: what is found there must not beat a bound."""
    graph = draw_graph(random, 12)
    cluster = draw_cluster(random, graph, serial=False)
    homes = [random.choice((0, 0, len(cluster.devices) - 1)) for _ in graph.groups]
    pinned = Placement(tuple(by_operator(graph, homes)), graph.order, "random")
    found = [placement for placement in (pinned, m_etf(graph, cluster), heft(graph, cluster)) if placement is not None]
    for step in (simulate(graph, cluster, placement) for placement in found):
        if fits(cluster, step):
            least_memory(graph, cluster)
            assert all(seconds <= step.makespan + 1e-9 for seconds in lower_bounds(graph, cluster).values())


@given(seeds())
@settings(deadline=None, max_examples=150)
def test_at_a_moment_a_device_holds_at_least_what_is_said(random):
    """With all on one device, its fullest second holds at least what each moment says."""
    graph = draw_graph(random, 10)
    one = Cluster((Device("x", 10**9),), Link(1.0))
    step = simulate(graph, one, Placement((0,) * len(graph.operators), graph.order, "one"))
    every = moments(graph)
    assert all(sum(sizes) <= step.peak_bytes[0] for sizes in every)
    assert sum(every[0]) == step.memory[0][-1][1]


def test_only_what_is_still_to_be_read_waits():
    """A chain in one group passes its outputs on; while training, those of the forward wait for the backward of their layer."""
    chain = Graph(
        "chain", tuple(Operator(str(at), 1.0, 1, output_bytes=10, group="g") for at in range(5)), tuple((at, at + 1) for at in range(4))
    )
    assert moments(chain) == [[15], [15]]  # five weights, and either the result or one output on its way
    layers = tuple(Operator(name, 1.0, 1, output_bytes=10, group=name.strip("'"), backward="'" in name) for name in ("a", "b", "b'", "a'"))
    training = Graph("training", layers, ((0, 1), (1, 2), (2, 3), (0, 3)))
    assert moments(training)[1] == [12, 12]
    with pytest.raises(DoesNotFit, match="24 B at one time"):
        least_memory(training, devices(2, 11))


def test_mostly_nothing_is_left_between_bound_and_best():
    """Over tiny graphs with enough memory, six of ten bounds are reached: they are not all loose."""
    reached = 0
    for seed in range(60):
        random = rolls.Random(seed)
        graph = draw_graph(random, 4, sizes=False)
        cluster = draw_cluster(random, graph)
        best = min(simulate(graph, cluster, placement).makespan for placement in all_placements(graph, cluster))
        reached += bound(graph, cluster)[0] >= best * (1 - 1e-9)
    assert reached >= 36


def test_critical_path():
    graph = Graph("path", (Operator("a", 2.0), Operator("b", 3.0), Operator("c", 4.0)), ((0, 1), (0, 2)))
    fast = Cluster((Device("x", 9), Device("y", 9, 2.0)), Link(1.0))
    assert lower_bounds(graph, devices(3))["critical path"] == pytest.approx(6)
    assert lower_bounds(graph, fast)["critical path"] == pytest.approx(3)


def test_work_between_what_comes_before_and_after():
    """One second, then eight operators of one second on four devices, then one second."""
    graph = Graph("wide", tuple(Operator(f"o{at}", 1.0) for at in range(10)), tuple(e for at in range(1, 9) for e in ((0, at), (at, 9))))
    assert lower_bounds(graph, devices(4))["work"] == pytest.approx(4)


def test_a_group_runs_on_one_device():
    graph = Graph("group", tuple(Operator(f"o{at}", 2.0, group="g") for at in range(3)), ())
    assert lower_bounds(graph, devices(4))["largest operator"] == pytest.approx(6)


def test_inputs_are_computed_here_or_sent():
    """Two operators of 4 s, whose outputs take 3 s, into one: one after the other it starts at 8, from two devices at 7."""
    operators = (Operator("a", 4.0, output_bytes=3), Operator("b", 4.0, output_bytes=3), Operator("c", 1.0))
    assert bound(Graph("join", operators, ((0, 2), (1, 2))), devices(2)) == (pytest.approx(8), "transfers")
    assert bound(Graph("join", operators, ((0, 2), (1, 2))), devices(2, rate=0.5)) == (pytest.approx(9), "transfers")


def test_a_chain_that_memory_cuts():
    """Six operators of two bytes on devices of four: two transfers, the cheapest being 1 and 2 with at most two operators between."""
    sends = (9, 2, 5, 1, 7)
    graph = Graph(
        "chain",
        tuple(Operator(f"o{at}", 1.0, 2, transfer_seconds=float((*sends, 0)[at])) for at in range(6)),
        tuple((at, at + 1) for at in range(5)),
    )
    assert bound(graph, devices(3, room=4)) == (pytest.approx(6 + 2 + 1), "memory")
    best = min(
        simulate(graph, devices(3, 4), p).makespan
        for p in all_placements(graph, devices(3, 4))
        if fits(devices(3, 4), simulate(graph, devices(3, 4), p))
    )
    assert best == 9


def test_the_longest_path_is_one():
    graph = Graph("paths", tuple(Operator(str(at), 1.0) for at in range(5)), ((0, 2), (1, 2), (2, 3), (2, 4)))
    assert longest_path(graph, [1, 5, 1, 1, 9]) == [1, 2, 4]
    assert least_cut_seconds(graph, times(graph, devices(2)), [1] * 5, 10) == 3


def test_least_memory_says_by_how_much():
    graph = Graph("model", tuple(Operator(f"o{at}", 1.0, 600, group="g" if at else "") for at in range(3)), ())
    with pytest.raises(DoesNotFit, match=r"`model` needs 1\.8 KiB at one time .* have 1\.6 KiB together") as error:
        least_memory(graph, devices(2, 800))
    assert "200 B" in error.value.hint
    with pytest.raises(DoesNotFit, match=r"group `g` of `model` needs 1\.2 KiB") as error:
        least_memory(graph, devices(2, 1000))
    assert "200 B" in error.value.hint
    least_memory(graph, devices(2, 1200))


def test_least_memory_counts_what_runs():
    operators = (Operator("a", 1.0, output_bytes=30), Operator("b", 1.0, 20, 5, 40, 10))
    graph = Graph("run", operators, ((0, 1),))
    with pytest.raises(DoesNotFit, match="operator `b` of `run` needs 105 B"):
        least_memory(graph, devices(2, 104))
    least_memory(graph, devices(2, 105))
    assert fits(devices(2, 105), simulate(graph, devices(2, 105), Placement((0, 0), (0, 1), "one")))
