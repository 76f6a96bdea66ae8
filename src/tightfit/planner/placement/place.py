"""Place: ask every algorithm, make the best answer better, and say how far from the best possible it can be."""

import time

from tightfit.planner.placement.bounds import bound, least_memory
from tightfit.planner.placement.exact import exact
from tightfit.planner.placement.improve import Effort, improve
from tightfit.planner.placement.simulate import simulate
from tightfit.planner.placement.starts import starts
from tightfit.planner.placement.throughput import throughput
from tightfit.terms.cluster import Cluster
from tightfit.terms.errors import DoesNotFit, TightfitError, near
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placed, Placement
from tightfit.terms.units import show_bytes

_OBJECTIVES = ("makespan", "throughput")

_MOST_FOR_PROGRAM = 200
"""Operators up to which the integer program is asked, too; of chains so many are proven in a second."""

_ABOVE = 1 + 1e-9
"""Times a bound: more is not rounding."""

_SEARCHED = 0.4
"""Of the time, for local search, where the integer program comes after it."""


def place(graph: Graph, cluster: Cluster, objective: str = "makespan", seconds: float = 10.0, seed: int = 0) -> Placed:
    """The best placement that is found: no worse than Baechi's three, and never past a device's memory.

    `objective`: `makespan`, one step from its first operator to its last, or `throughput`, the largest load of a pipeline's device.
    `seconds`: for making the best answer better; the algorithms themselves take what they take. The same `seed` looks at the same places,
    as far as time allows. Raises `DoesNotFit` where no placement fits, or none was found, and `TightfitError` for another objective.
    """
    if objective not in _OBJECTIVES:
        raise TightfitError(f"no objective is called `{objective}`", hint=near(objective, _OBJECTIVES))
    if objective == "throughput":
        return throughput(graph, cluster, max(1.0, seconds), seed=seed)
    began = time.perf_counter()
    least_memory(graph, cluster)
    found = starts(graph, cluster)
    tried = {name: simulate(graph, cluster, placement).makespan if placement else None for name, placement in found.items()}
    fitting = {name: taken for name, taken in tried.items() if taken is not None}
    if not fitting:
        raise _none_found(graph, cluster)
    best = min(fitting, key=lambda name: fitting[name])
    below, by = bound(graph, cluster)
    placement = found[best]
    assert placement is not None, "what has a makespan was found"
    if seconds and fitting[best] > below * _ABOVE:
        placement, below, by, more = _better(graph, cluster, placement, (below, by), seconds, seed)
        tried |= more
    step = simulate(graph, cluster, placement)
    return Placed(
        "makespan", step.makespan, min(below, step.makespan), by, placement, step.peak_bytes, tried, time.perf_counter() - began
    )  # fmt: skip


def _better(
    graph: Graph, cluster: Cluster, start: Placement, known: tuple[float, str], seconds: float, seed: int
) -> tuple[Placement, float, str, dict[str, float]]:
    """By local search, and for few operators by the integer program: placement, bound, what that rests on, makespan by way."""
    below, by = known
    small = len(graph.operators) <= _MOST_FOR_PROGRAM
    effort = Effort(10**9, seconds * (_SEARCHED if small else 1))
    placement, taken = _named(improve(graph, cluster, start, effort, seed, below), graph, cluster, start, "local search")
    tried = {"local search": taken}
    if small and taken > below * _ABOVE:
        optimum = exact(graph, cluster, placement, seconds * (1 - _SEARCHED))
        if optimum.bound_seconds > below:
            below, by = optimum.bound_seconds, "optimum" if optimum.proven else "integer program"
        placement, tried["integer program"] = _named(optimum.placement, graph, cluster, placement, "integer program")
    return placement, below, by, tried


def _named(found: Placement, graph: Graph, cluster: Cluster, before: Placement, way: str) -> tuple[Placement, float]:
    """What was found, if it is better than what was there before, under a name that says by which way; and its makespan."""
    taken = simulate(graph, cluster, found).makespan
    if taken >= simulate(graph, cluster, before).makespan:
        return before, taken
    return Placement(found.device_of, found.order, f"{way} from {before.by}"), taken


def _none_found(graph: Graph, cluster: Cluster) -> DoesNotFit:
    """Bytes do not exclude that there is one."""
    room = sum(device.memory_bytes for device in cluster.devices)
    return DoesNotFit(
        f"no placement of `{graph.name}` was found that fits: {show_bytes(graph.weight_bytes)} of weights in {show_bytes(room)}, and what "
        "is made on the way",
        hint="give the devices more memory, or add one",
    )
