"""Exact: the makespan as an integer program, for graphs of some thirty operators, or of more that mostly follow on each other."""

from dataclasses import dataclass

from tightfit.planner.placement.bounds import bound as lower_bound
from tightfit.planner.placement.program import formulate
from tightfit.planner.placement.simulate import fits, simulate
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
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    best = simulate(graph, cluster, start).makespan
    if not best:
        return Optimum(start, 0.0, 0.0)
    floor = min(best, lower_bound(graph, cluster)[0])
    program = formulate(graph, cluster, best)
    found = milp(
        program.costs,
        constraints=LinearConstraint(program.rows, program.least, float("inf")),  # type: ignore[arg-type]
        integrality=program.whole,
        bounds=Bounds(program.low, program.high),  # type: ignore[arg-type]
        options={"time_limit": seconds_limit, "mip_rel_gap": 1e-6},
    )
    # nothing at or below the start: then the start is within tolerance of the best
    proven = best if found.status == 2 else best * (found.mip_dual_bound or 0.0)
    bound = max(floor, min(proven, best) * (1 - _TOLERANCE))
    if found.x is not None:
        placement = program.placement(found.x)
        step = simulate(graph, cluster, placement)
        if fits(cluster, step) and step.makespan < best:
            return Optimum(placement, step.makespan, min(bound, step.makespan))
    return Optimum(start, best, bound)
