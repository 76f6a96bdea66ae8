"""m-ETF: against the paper's event loop written plainly, by hand, and on random graphs from ample to hardly any memory."""

import random as rolls

from hypothesis import given, settings
from placing import all_placements, draw_cluster, draw_graph, is_sound, seeds

from tightfit.planner.placement.m_etf import earliest_task_first, m_etf
from tightfit.planner.placement.orders import places
from tightfit.planner.placement.progress import Progress
from tightfit.planner.placement.simulate import fits, simulate
from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.graph import Graph, Operator

JOIN = Graph(
    "join",
    (Operator("a", 2.0, output_bytes=4), Operator("b", 3.0, output_bytes=1), Operator("c", 1.0), Operator("d", 1.0)),
    ((0, 2), (1, 2), (0, 3)),
)


def test_by_hand():
    """a and b start at once on their own devices; d follows a; c could start at 4 beside a, for b's byte takes a second, or at 6."""
    cluster = Cluster((Device("x", 99), Device("y", 99)), Link(1.0))
    found = m_etf(JOIN, cluster)
    assert found is not None
    assert found.device_of == (0, 1, 0, 0)
    assert simulate(JOIN, cluster, found).start == (0, 0, 4, 2)


def test_a_faster_device_is_taken_where_both_are_idle():
    cluster = Cluster((Device("slow", 99, 0.5), Device("fast", 99, 2.0)), Link(1.0))
    found = m_etf(Graph("one", (Operator("a", 4.0),), ()), cluster)
    assert found is not None
    assert found.device_of == (1,)


def test_the_whole_groups_weights_are_reserved():
    """Without reserving, the free operator would take the room that the group's second operator needs."""
    graph = Graph("room", (Operator("a", 1.0, 4, group="g"), Operator("free", 1.0, 6), Operator("b", 1.0, 6, group="g")), ((0, 2),))
    cluster = Cluster((Device("x", 10), Device("y", 6)), Link(1.0))
    found = m_etf(graph, cluster)
    assert found is not None
    assert found.device_of == (0, 1, 0)


def test_what_greed_cannot_place_is_packed_first():
    """Earliest first puts 4 and 2 on two devices, so that 3 and 3 no longer fit; packing finds 4 + 2 and 3 + 3."""
    graph = Graph("pack", tuple(Operator(str(size), 1.0, size) for size in (4, 2, 3, 3)), ())
    cluster = Cluster((Device("x", 6), Device("y", 6)), Link(1.0))
    assert earliest_task_first(graph, cluster, range(4), "m-ETF") is None
    found = m_etf(graph, cluster)
    assert found is not None
    assert simulate(graph, cluster, found).peak_bytes == (6, 6)


def test_weights_are_there_from_the_first_second_on():
    """What is temporary in a (8 bytes) is gone when b starts, but b's 5 bytes of weights were there beside it: they need 13."""
    graph = Graph("early", (Operator("a", 1.0, temporary_bytes=8), Operator("b", 1.0, 5)), ((0, 1),))
    assert m_etf(graph, Cluster((Device("x", 12),), Link(1.0))) is None
    assert m_etf(graph, Cluster((Device("x", 13),), Link(1.0))) is not None
    assert earliest_task_first(graph, Cluster((Device("x", 12),), Link(1.0)), [0, 1], "m-ETF") is None


def test_none_where_nothing_fits():
    assert m_etf(Graph("big", (Operator("a", 1.0, 11),), ()), Cluster((Device("x", 10),), Link(1.0))) is None


def plain(graph: Graph, cluster: Cluster) -> list[tuple[int, int, float]] | None:
    """The paper's loop, with every ready operator looked at anew each time: operator, device, start."""
    progress, rank, placed = Progress(graph, cluster), places(graph.order), []
    while len(placed) < len(graph.operators):
        ready = [
            at
            for at in range(len(graph.operators))
            if progress.device_of[at] < 0 and all(progress.device_of[parent] >= 0 for parent in graph.parents[at])
        ]
        starts = []
        for at in ready:
            for device in range(len(cluster.devices)):
                start = progress.free[device]
                for parent in graph.parents[at]:
                    link = cluster.link_between(progress.device_of[parent], device)
                    sent = link.seconds(graph.operators[parent]) if progress.device_of[parent] != device else 0.0
                    start = max(start, progress.end[parent] + sent)
                if progress.fits(at, device, start):
                    starts.append((start, rank[at], start + graph.operators[at].seconds / cluster.devices[device].speed, device, at))
        if not starts:
            return None
        start, _, _, device, at = min(starts)
        progress.put(at, device, start)
        placed.append((at, device, start))
    return placed


@given(seeds())
@settings(deadline=None, max_examples=150)
def test_the_heaps_find_what_looking_at_everything_finds(random):
    graph = draw_graph(random, 14)
    cluster = draw_cluster(random, graph, serial=False)
    found, expected = earliest_task_first(graph, cluster, places(graph.order), "m-ETF"), plain(graph, cluster)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert [(at, found.device_of[at]) for at in found.order] == [(at, device) for at, device, _ in expected]
        assert simulate(graph, cluster, found).start == tuple(start for _, _, start in sorted(expected))


@given(seeds())
@settings(deadline=None, max_examples=150)
def test_while_transfers_do_not_disturb_each_other_memory_is_exact_while_scheduling(random):
    graph = draw_graph(random, 14)
    cluster = draw_cluster(random, graph, serial=False)
    found = earliest_task_first(graph, cluster, places(graph.order), "m-ETF")
    if found is not None:
        assert is_sound(graph, cluster, found)
        assert fits(cluster, simulate(graph, cluster, found))


@given(seeds())
@settings(deadline=None, max_examples=100)
def test_what_is_found_fits(random):
    graph = draw_graph(random, 12)
    cluster = draw_cluster(random, graph)
    found = m_etf(graph, cluster)
    if found is not None:
        assert is_sound(graph, cluster, found)
        assert fits(cluster, simulate(graph, cluster, found))


def test_a_placement_is_found_wherever_one_exists_but_rarely_not():
    """Over all placements of tiny graphs: of those that can be placed, at least 95 of 100 are."""
    exist, found = 0, 0
    for seed in range(250):
        random = rolls.Random(seed)
        graph = draw_graph(random, 4)
        cluster = draw_cluster(random, graph)
        if any(fits(cluster, simulate(graph, cluster, placement)) for placement in all_placements(graph, cluster)):
            exist += 1
            found += m_etf(graph, cluster) is not None
    assert exist > 150
    assert found >= 0.95 * exist
