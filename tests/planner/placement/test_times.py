"""Times: looked up once, against sums over every device and every pair of devices."""

import pytest
from hypothesis import given, settings
from placing import draw_cluster, draw_graph, seeds

from tightfit.planner.placement.times import times
from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.graph import Graph, Operator


@given(seeds())
@settings(deadline=None, max_examples=100)
def test_they_are_what_speeds_and_links_say(random):
    graph = draw_graph(random, 9)
    cluster = draw_cluster(random, graph)
    costs, numbers = times(graph, cluster), range(len(cluster.devices))
    pairs = [(source, target) for source in numbers for target in numbers if source != target]
    for at, operator in enumerate(graph.operators):
        runs = [operator.seconds / device.speed for device in cluster.devices]
        assert [on[at] for on in costs.run] == runs
        sends = {pair: cluster.link_between(*pair).seconds(operator) for pair in pairs}
        assert {(s, t): costs.send[s][t][at] for s in numbers for t in numbers} == {(n, n): 0.0 for n in numbers} | sends
        assert costs.fastest_run[at] == min(runs)
        assert costs.typical_run[at] == pytest.approx(sum(runs) / len(runs))
        assert costs.fastest_send[at] == min(sends.values(), default=0.0)
        assert costs.typical_send[at] == pytest.approx(sum(sends.values()) / max(1, len(sends)))


def test_what_is_asked_often_is_worked_out_once():
    graph = Graph("one", (Operator("a", 1.0),), ())
    costs = times(graph, Cluster((Device("x", 9), Device("y", 9)), Link(1.0)))
    assert costs.fastest_run is costs.fastest_run
    assert costs.fastest_send is costs.fastest_send
    assert costs.typical_run is costs.typical_run
    assert costs.typical_send is costs.typical_send
