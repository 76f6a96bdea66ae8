"""Exact: the makespan as an integer program, for graphs of some thirty operators, or of more that mostly follow on each other."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from tightfit.planner.placement.bounds import bound as lower_bound
from tightfit.planner.placement.m_etf import earliest_task_first
from tightfit.planner.placement.orders import depth_first, ranks_of, urgent_first
from tightfit.planner.placement.program import formulate
from tightfit.planner.placement.simulate import fits, simulate
from tightfit.planner.placement.times import times
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placement

_TOLERANCE = 2e-5  # a share of the makespan: what the solver's tolerances on rows and whole numbers could hide


@dataclass(frozen=True)
class Optimum:
    """The best placement that was met, its simulated makespan, and what none can be below."""

    placement: Placement
    seconds: float
    bound_seconds: float

    @property
    def proven(self) -> bool:
        """Nothing better is left, but for the solver's tolerance."""
        return self.bound_seconds >= self.seconds * (1 - 2 * _TOLERANCE)


def exact(graph: Graph, cluster: Cluster, start: Placement, seconds_limit: float = 60.0) -> Optimum:
    """The optimum, or what is found and proven within `seconds_limit`; never worse than `start`, which fits.

    The program knows what is on a device at some moments, and transfers that do not disturb each other. So its bound holds in every case,
    and its placement counts only as `simulate` judges it: exact memory over time, and one channel per device where the cluster says so.
    Where that is worse than what the program says of it, these homes are forbidden and the program is asked again, while time is left;
    the bound is what the first answer proves, for another order of the same homes may be better.
    """
    until, best = time.perf_counter() + seconds_limit, simulate(graph, cluster, start).makespan
    if not best:
        return Optimum(start, 0.0, 0.0)
    floor = min(best, lower_bound(graph, cluster)[0])
    scale, program = best, formulate(graph, cluster, best)
    found = program.solve(seconds_limit)
    # nothing at or below the start: then the start is within tolerance of the best
    proven = best if found.status == 2 else best * (found.mip_dual_bound or 0.0)
    bound = max(floor, min(proven, best) * (1 - _TOLERANCE))
    while found.x is not None and found.fun * scale < best * (1 - _TOLERANCE):
        for placement in _in_some_orders(graph, cluster, program.placement(found.x)):
            step = simulate(graph, cluster, placement)
            if step.makespan < best and fits(cluster, step):
                start, best = placement, step.makespan
        left = until - time.perf_counter()
        if left <= 0 or best <= found.fun * scale * (1 + _TOLERANCE):
            break
        program = program.without(found.x)
        found = program.solve(left)
    return Optimum(start, best, min(bound, best))


def _in_some_orders(graph: Graph, cluster: Cluster, found: Placement) -> Iterator[Placement]:
    """`found`, and its homes in orders that ask for less memory, or make the others wait less."""
    yield found
    ranks = ranks_of(graph, times(graph, cluster), found.device_of)
    for order in (urgent_first(graph, ranks), depth_first(graph)):
        yield Placement(found.device_of, order, found.by)
    sparing = earliest_task_first(graph, cluster, [-rank for rank in ranks], found.by, found.device_of)
    if sparing is not None:
        yield sparing
