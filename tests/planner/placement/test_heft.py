"""HEFT: the gap that it finds, against a walk through all that a device runs; and how its time grows."""

import time
from bisect import insort

from hypothesis import given, settings
from placing import seeds

from tightfit.planner.placement.heft import Line, with_gaps
from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.graph import Graph, Operator


def walked(busy: list[tuple[float, float]], there: float, takes: float) -> float:
    """The first start at or after `there` that overlaps nothing: by looking at every start that could be."""
    starts = [there, *(over for _, over in busy if over > there)]
    return min(start for start in starts if all(over <= start or start + takes <= begin for begin, over in busy))


@given(seeds())
@settings(deadline=None, max_examples=150)
def test_a_line_tells_the_first_gap_that_is_long_enough(random):
    line, busy = Line(), []
    for _ in range(random.randint(1, 40)):
        there, takes = float(random.randint(0, 30)), float(random.choice((0, 0, 1, 2, 3, 5)))
        start = line.first_gap(there, takes)
        assert start == walked(busy, there, takes)
        line.put(start, start + takes)
        insort(busy, (start, start + takes))


def test_many_operators_that_nothing_connects_are_placed_in_linear_time():
    """Where each walks past all others, that takes a minute."""
    graph = Graph("apart", tuple(Operator(str(at), 1.0) for at in range(20_000)), ())
    began = time.process_time()
    found = with_gaps(graph, Cluster(tuple(Device(str(at), 1) for at in range(4)), Link(1.0)))
    assert time.process_time() - began < 10
    assert found is not None
    assert [found.device_of.count(device) for device in range(4)] == [5000] * 4
