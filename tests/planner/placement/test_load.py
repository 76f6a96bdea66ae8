"""Load: what a device does per sample and holds, by hand and against plain references; the order in which data flows."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipelines import cluster_of, clusters, flows_one_way, graphs, plain_load, quick

from tightfit.planner.placement.load import alone_bytes, flow, held_bytes, load, pipeline_order, stages
from tightfit.planner.placement.simulate import simulate
from tightfit.terms.cluster import Cluster, Link
from tightfit.terms.graph import Graph, Operator
from tightfit.terms.placement import Placement


def fan() -> Graph:
    """One output that three read."""
    operators = (
        Operator("a", 4.0, output_bytes=3),
        Operator("b", 2.0, output_bytes=1),
        Operator("c", 6.0, transfer_seconds=0.5),
        Operator("d", 8.0),
    )
    return Graph("fan", operators, ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3)))


def test_loads_by_hand() -> None:
    cluster = cluster_of(100, 100, 100, speeds=(1.0, 2.0, 4.0))
    assert load(fan(), cluster, (0, 0, 0, 0)) == (20.0, 0.0, 0.0)
    # a is sent once (3) and read once by each of the others (3); b's output costs 1 and c's 0.5 on both sides
    assert load(fan(), cluster, (0, 1, 1, 2)) == (4 + 3, 3 + (2 + 6) / 2 + 1 + 0.5, 3 + 1 + 0.5 + 8 / 4)


def test_unlike_links_send_over_the_slowest() -> None:
    links = {(0, 1): Link(0.5), (0, 2): Link(1.5)}
    cluster = Cluster(cluster_of(100, 100, 100).devices, Link(1.0), links)
    assert load(fan(), cluster, (0, 1, 2, 0)) == (4 + 8 + 6 + 1 + 0.5, 6 + 2 + 1, 2 + 6 + 0.5)


@quick
@given(st.data(), graphs(), clusters())
def test_loads_are_what_the_readme_says(data: st.DataObject, graph: Graph, cluster: Cluster) -> None:
    device_of = tuple(data.draw(st.integers(0, len(cluster.devices) - 1)) for _ in graph.operators)
    assert load(graph, cluster, device_of) == pytest.approx(plain_load(graph, cluster, device_of))


@quick
@given(st.data(), graphs(), clusters())
def test_held_bytes_by_counting_what_lives_at_each_operator(data: st.DataObject, graph: Graph, cluster: Cluster) -> None:
    device_of = tuple(data.draw(st.integers(0, len(cluster.devices) - 1)) for _ in graph.operators)
    order = pipeline_order(graph, device_of)
    for device in range(len(cluster.devices)):
        own = [at for at in order if device_of[at] == device]
        peak = 0
        for number, at in enumerate(own):
            before, behind = own[: number + 1], own[number:]
            held = sum(graph.operators[o].weight_bytes for o in own) + sum(graph.operators[o].kept_bytes for o in before)
            alive = {o for o in before if not graph.children[o] or any(c in behind or c not in own for c in graph.children[o])}
            alive |= {o for o in range(len(graph.operators)) if o not in own and any(c in behind for c in graph.children[o])}
            peak = max(peak, held + sum(graph.operators[o].output_bytes for o in alive) + graph.operators[at].temporary_bytes)
        assert held_bytes(graph, cluster, device_of)[device] == peak


@quick
@given(st.data(), graphs(), clusters())
def test_stages_and_order(data: st.DataObject, graph: Graph, cluster: Cluster) -> None:
    device_of = tuple(data.draw(st.integers(0, len(cluster.devices) - 1)) for _ in graph.operators)
    found, order = stages(graph, device_of), pipeline_order(graph, device_of)
    assert (found is not None) == flows_one_way(graph, device_of)
    assert sorted(order) == list(range(len(graph.operators)))
    assert all(order.index(source) < order.index(target) for source, target in graph.edges)
    if found:
        assert sorted(found) == sorted(set(device_of))
        assert all(found.index(device_of[source]) <= found.index(device_of[target]) for source, target in flow(graph))
        runs = [(graph.operators[at].backward, device_of[at]) for at in order]
        assert sum(one != other for one, other in pairwise(runs)) == len(set(runs)) - 1, "each stage runs at one go"


@quick
@given(st.data(), graphs(), clusters())
def test_no_simulated_step_holds_more(data: st.DataObject, graph: Graph, cluster: Cluster) -> None:
    """Whatever transfers do, with one channel each or many."""
    device_of = tuple(data.draw(st.integers(0, len(cluster.devices) - 1)) for _ in graph.operators)
    placement, bounds = Placement(device_of, pipeline_order(graph, device_of), "any"), held_bytes(graph, cluster, device_of)
    for serial in (False, True):
        step = simulate(graph, Cluster(cluster.devices, cluster.link, serial=serial), placement)
        assert all(peak <= bound for peak, bound in zip(step.peak_bytes, bounds, strict=True))


def test_the_backward_flows_against_the_forward_unless_the_file_turned_it() -> None:
    operators = tuple(Operator(f"{kind}{at}", 1.0, group=str(at), backward=kind == "b") for kind in "fb" for at in range(3))
    against = Graph("against", operators, ((0, 1), (1, 2), (4, 3), (5, 4)))
    along = Graph("along", operators, ((0, 1), (1, 2), (3, 4), (4, 5)))
    assert set(flow(against)) == {(0, 1), (1, 2), (3, 4), (4, 5)} == set(flow(along))
    assert pipeline_order(against, (0, 0, 1, 0, 0, 1)) == (0, 1, 2, 5, 4, 3)
    assert pipeline_order(along, (0, 0, 1, 0, 0, 1)) == (0, 1, 2, 3, 4, 5)


@quick
@given(graphs())
def test_what_a_group_holds_alone(graph: Graph) -> None:
    cluster = cluster_of(1, 1)
    for members, alone in zip(graph.groups, alone_bytes(graph), strict=True):
        assert alone == held_bytes(graph, cluster, [0 if at in members else 1 for at in range(len(graph.operators))])[0]
