"""m-SCT: the linear program against its definition, favourites, awake devices by hand, and random graphs."""

import itertools

import pytest
from hypothesis import given, settings
from placing import draw_cluster, draw_graph, is_sound, seeds

from tightfit.planner.placement.favourites import favourite_children, relaxed
from tightfit.planner.placement.m_etf import m_etf
from tightfit.planner.placement.m_sct import m_sct, small_communication_time
from tightfit.planner.placement.orders import places
from tightfit.planner.placement.simulate import fits, simulate
from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.graph import Graph, Operator

TWO = Cluster((Device("x", 99), Device("y", 99)), Link(1.0))


def step_of(edges: list[tuple[int, int]], run: list[float], send: list[float], shares: list[float]) -> float:
    """The makespan that shares of transfers give, on machines without end."""
    end = [0.0] * len(run)
    for at in range(len(run)):  # the tests' edges rise
        arrivals = [end[edge[0]] + share * send[edge[0]] for edge, share in zip(edges, shares, strict=True) if edge[1] == at]
        end[at] = max(arrivals, default=0.0) + run[at]
    return max(end)


def test_the_program_keeps_the_dear_child():
    """Two children of one parent; one has much to do behind it, so it is the one to stay."""
    shares = relaxed([(0, 1), (0, 2)], [1.0, 9.0, 1.0], [2.0, 0.0, 0.0])
    assert shares == pytest.approx([0.0, 1.0], abs=1e-6)


@given(seeds())
@settings(deadline=None, max_examples=40)
def test_the_program_is_no_worse_than_any_whole_choice_and_keeps_its_rules(random):
    count = random.randint(2, 6)
    edges = [pair for pair in itertools.combinations(range(count), 2) if random.random() < 0.4]
    run, send = [random.random() + 0.1 for _ in range(count)], [random.random() * 3 for _ in range(count)]
    if not edges:
        return
    shares = relaxed(edges, run, send)
    for side in (0, 1):
        for at in range(count):
            own = [share for share, edge in zip(shares, edges, strict=True) if edge[side] == at]
            assert sum(own) >= len(own) - 1 - 1e-6
    whole = [
        step_of(edges, run, send, choice)
        for choice in itertools.product((0, 1), repeat=len(edges))
        if all(sum(x for x, e in zip(choice, edges, strict=True) if e[side] == at) >= sum(e[side] == at for e in edges) - 1
               for side in (0, 1) for at in range(count))
    ]  # fmt: skip
    assert step_of(edges, run, send, shares) <= min(whole) + 1e-3 * sum(run) + 1e-6  # the second aim may cost a thousandth of all work


@given(seeds())
@settings(deadline=None, max_examples=60)
def test_no_operator_is_the_favourite_of_two(random):
    graph = draw_graph(random, 12)
    cluster = draw_cluster(random, graph)
    favourites = [child for child in favourite_children(graph, cluster) if child >= 0]
    assert len(favourites) == len(set(favourites))
    for at, child in enumerate(favourite_children(graph, cluster)):
        assert child < 0 or child in graph.children[at]


def test_favourites_by_way_of_chains(monkeypatch):
    """Larger graphs are asked by their chains: within one, each operator's favourite is the next."""
    monkeypatch.setattr("tightfit.planner.placement.favourites._LARGE_EDGES", 0)
    operators = tuple(Operator(f"o{at}", 1.0, output_bytes=size) for at, size in enumerate((1, 1, 9, 1, 1)))
    graph = Graph("two tails", operators, ((0, 1), (1, 2), (2, 3), (2, 4)))
    favourites = favourite_children(graph, TWO)
    assert favourites[:2] == [1, 2]
    assert favourites[2] in (3, 4)


WAIT = Graph(
    "wait",
    (
        Operator("a", 4.0, output_bytes=5),
        Operator("b", 4.0, output_bytes=1),
        Operator("child", 10.0),
        Operator("late", 1.0, output_bytes=0),
        Operator("other", 6.0),
    ),
    ((0, 2), (1, 2), (1, 3), (0, 4)),
)


def test_an_awake_device_waits_for_its_favourite_child():
    """At 4 device x could start `other`; it waits until 5 for the child that b's output is on its way to, and y takes what is left."""
    order = places(WAIT.order)
    waits = small_communication_time(WAIT, TWO, [2, -1, -1, -1, -1], order)
    greedy = small_communication_time(WAIT, TWO, [-1] * 5, order)
    assert waits is not None
    assert greedy is not None
    assert simulate(WAIT, TWO, waits).start[2] == 5
    assert waits.device_of[2] == waits.device_of[0]
    assert simulate(WAIT, TWO, greedy).start[4] == 4
    assert simulate(WAIT, TWO, waits).makespan < simulate(WAIT, TWO, greedy).makespan


def test_an_urgent_operator_does_not_wait():
    """As above, but `quick` could run on both devices at 4: x runs it before the child arrives."""
    for seconds, device in ((0.5, 0), (2.0, 0)):
        operators = (*WAIT.operators[:3], Operator("quick", seconds))
        found = small_communication_time(Graph("urgent", operators, ((0, 2), (1, 2))), TWO, [2, -1, -1, -1], [0, 1, 2, 9])
        assert found is not None
        step = simulate(Graph("urgent", operators, ((0, 2), (1, 2))), TWO, found)
        assert (found.device_of[3], step.start[3]) == (device, 4)
        assert step.start[2] == max(5, 4 + seconds)


def test_what_another_device_must_still_wait_for_is_not_urgent():
    """`quick` reads b, whose output is on x at 5 only; so x, awake for the child until 5, leaves it to y."""
    operators = (*WAIT.operators[:3], Operator("quick", 0.5))
    graph = Graph("not urgent", operators, ((0, 2), (1, 2), (1, 3)))
    found = small_communication_time(graph, TWO, [2, -1, -1, -1], [0, 1, 2, 9])
    assert found is not None
    assert found.device_of[3] == 1


def test_a_device_whose_turn_has_passed_by_then_is_not_urgent():
    """y takes `late` at 4, so `other` could start there at 5 only: x, awake for the child until 5, does not start it before."""
    operators = (*WAIT.operators[:4], Operator("other", 0.5))
    graph = Graph("busy", operators, ((0, 2), (1, 2), (1, 3)))
    found = small_communication_time(graph, TWO, [2, -1, -1, -1, -1], [0, 1, 2, 3, 9])
    assert found is not None
    assert simulate(graph, TWO, found).start[2:] == (5, 4, 5)


def test_no_device_waits_for_what_can_start_sooner_elsewhere():
    """b's nine bytes reach x at 13, a's five reach y at 9: so x does not wait, and all is as without favourites."""
    operators = (WAIT.operators[0], Operator("b", 4.0, output_bytes=9), *WAIT.operators[2:])
    graph = Graph("sooner", operators, WAIT.edges)
    ways = [small_communication_time(graph, TWO, favourites, places(graph.order)) for favourites in ([2, -1, -1, -1, -1], [-1] * 5)]
    assert ways[0] is not None
    assert ways[0] == ways[1]


@given(seeds())
@settings(deadline=None, max_examples=80)
def test_without_favourites_it_is_earliest_task_first(random):
    graph = draw_graph(random, 12)
    cluster = draw_cluster(random, graph, serial=False)
    plain = small_communication_time(graph, cluster, [-1] * len(graph.operators), places(graph.order))
    etf = m_etf(graph, cluster)
    if plain is not None and etf is not None:
        assert (plain.device_of, plain.order) == (etf.device_of, etf.order)


@given(seeds())
@settings(deadline=None, max_examples=80)
def test_what_is_found_fits(random):
    graph = draw_graph(random, 12)
    cluster = draw_cluster(random, graph)
    found = m_sct(graph, cluster)
    if found is not None:
        assert is_sound(graph, cluster, found)
        assert fits(cluster, simulate(graph, cluster, found))
