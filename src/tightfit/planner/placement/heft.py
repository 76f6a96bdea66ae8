"""HEFT: the most urgent operator goes where it ends first, into a gap if there is one (Topcuoglu, Hariri and Wu 2002)."""

from bisect import insort
from collections.abc import Iterator

from tightfit.planner.placement.orders import group_of, upward_ranks, urgent_first
from tightfit.planner.placement.pack import first_that_fits, group_bytes
from tightfit.planner.placement.progress import Progress
from tightfit.planner.placement.times import times
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placement


def heft(graph: Graph, cluster: Cluster) -> Placement | None:
    """Heterogeneous earliest finish time: a placement that fits, or None where none was found.

    First with gaps, and memory only by what lasts; where that does not fit, without gaps, and memory exact over time.
    """

    def attempts() -> Iterator[Placement | None]:
        yield with_gaps(graph, cluster)
        yield without_gaps(graph, cluster)

    return first_that_fits(graph, cluster, attempts())


def with_gaps(graph: Graph, cluster: Cluster) -> Placement | None:
    """Each operator into the first gap on the device where it then ends first; None where what lasts fits nowhere."""
    costs, sizes, group = times(graph, cluster), group_bytes(graph), group_of(graph)
    room, home = [device.memory_bytes for device in cluster.devices], [-1] * len(sizes)
    busy: list[list[tuple[float, float]]] = [[] for _ in cluster.devices]  # start and end of what runs there, in order
    device_of, end = [-1] * len(graph.operators), [0.0] * len(graph.operators)
    started: list[tuple[float, int, int]] = []
    for place, at in enumerate(urgent_first(graph, upward_ranks(graph, costs))):
        bound = home[group[at]]
        could = [bound] if bound >= 0 else [device for device, left in enumerate(room) if sizes[group[at]] <= left]
        found = []
        for device in could:
            there = max((end[p] + costs.send[device_of[p]][device][p] for p in graph.parents[at]), default=0.0)
            start = _first_gap(busy[device], there, costs.run[device][at])
            found.append((start + costs.run[device][at], start, device))
        if not found:
            return None
        end[at], start, device = min(found)
        if bound < 0:
            home[group[at]] = device
            room[device] -= sizes[group[at]]
        device_of[at] = device
        insort(busy[device], (start, end[at]))
        started.append((start, place, at))
    return Placement(tuple(device_of), tuple(at for _, _, at in sorted(started)), "HEFT")


def without_gaps(graph: Graph, cluster: Cluster) -> Placement | None:
    """Each operator behind all others on the device where it then ends first and memory holds; None where it fits nowhere."""
    progress = Progress(graph, cluster)
    for at in urgent_first(graph, upward_ranks(graph, progress.costs)):
        starts = [(progress.earliest(at, device), device) for device in progress.devices(at)]
        for _, start, device in sorted((start + progress.costs.run[device][at], start, device) for start, device in starts):
            if progress.fits(at, device, start):
                progress.put(at, device, start)
                break
        else:
            return None
    return progress.placement("HEFT")


def _first_gap(busy: list[tuple[float, float]], there: float, takes: float) -> float:
    """The first time from `there` on when the device is idle for so long; gaps that end before `there` are skipped from the back."""
    number = len(busy)
    while number and busy[number - 1][1] > there:
        number -= 1
    start = there
    for begin, over in busy[number:]:
        if start + takes <= begin:
            break
        start = max(start, over)
    return start
