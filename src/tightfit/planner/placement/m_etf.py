"""m-ETF: of all operators and devices, what can start earliest starts next, where memory holds (Baechi, SoCC 2020)."""

from collections.abc import Iterator, Sequence

from tightfit.planner.placement.orders import depth_first, places
from tightfit.planner.placement.pack import first_that_fits, packings
from tightfit.planner.placement.progress import Progress
from tightfit.planner.placement.ready import Ready
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placement


def m_etf(graph: Graph, cluster: Cluster) -> Placement | None:
    """Earliest task first within memory: a placement that fits, or None where none was found.

    Of what can start at one time, the first in topological order starts, where it ends first. Where that gets stuck for want of memory,
    the groups are packed into the devices first, and only the order is left to it.
    """
    return first_that_fits(graph, cluster, _attempts(graph, cluster))


def earliest_task_first(
    graph: Graph, cluster: Cluster, priority: Sequence[float], by: str, pinned: Sequence[int] | None = None
) -> Placement | None:
    """List scheduling: the earliest start, of equals the lowest `priority`; None where the rest fits on no device.

    `pinned` binds each operator to a device. In the serial model it keeps memory only as far as it foresees the transfers.
    """
    progress = Progress(graph, cluster, pinned)
    ready = Ready(progress, priority)
    while (first := ready.earliest()) is not None:
        progress.put(first.operator, first.device, first.start)
        ready.after(first.operator)
    return progress.placement(by) if len(progress.order) == len(graph.operators) else None


def _attempts(graph: Graph, cluster: Cluster) -> Iterator[Placement | None]:
    priority = places(graph.order)
    yield earliest_task_first(graph, cluster, priority, by="m-ETF")
    deep = depth_first(graph)
    for pinned in packings(graph, cluster):
        yield earliest_task_first(graph, cluster, priority, by="m-ETF", pinned=pinned)
        yield earliest_task_first(graph, cluster, places(deep), by="m-ETF", pinned=pinned)
        yield Placement(tuple(pinned), deep, "m-ETF")
