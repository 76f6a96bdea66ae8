"""HEFT: the most urgent operator goes where it ends first, into a gap if there is one (Topcuoglu, Hariri and Wu 2002)."""

from bisect import bisect_right, insort
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
    lines = [Line() for _ in cluster.devices]
    device_of, end = [-1] * len(graph.operators), [0.0] * len(graph.operators)
    started: list[tuple[float, int, int]] = []
    for place, at in enumerate(urgent_first(graph, upward_ranks(graph, costs))):
        bound = home[group[at]]
        could = [bound] if bound >= 0 else [device for device, left in enumerate(room) if sizes[group[at]] <= left]
        found = []
        for device in could:
            there = max((end[p] + costs.send[device_of[p]][device][p] for p in graph.parents[at]), default=0.0)
            start = lines[device].first_gap(there, costs.run[device][at])
            found.append((start + costs.run[device][at], start, device))
        if not found:
            return None
        end[at], start, device = min(found)
        if bound < 0:
            home[group[at]] = device
            room[device] -= sizes[group[at]]
        device_of[at] = device
        lines[device].put(start, end[at])
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


class Line:
    """What one device runs, and the gaps between: of those that have a length there are few, however much it runs."""

    def __init__(self) -> None:
        self._starts: list[float] = []  # of all that runs, and their ends; both in order
        self._ends: list[float] = []
        self._gaps = [(0.0, float("inf"))]

    def first_gap(self, there: float, takes: float) -> float:
        """The first time from `there` on when the device is idle for so long; what takes no time may start between any two."""
        if not takes:
            number = bisect_right(self._ends, there)
            return there if number == len(self._ends) or there <= self._starts[number] else self._ends[number]
        number = max(0, bisect_right(self._gaps, (there, float("inf"))) - 1)
        while max(there, self._gaps[number][0]) + takes > self._gaps[number][1]:
            number += 1
        return max(there, self._gaps[number][0])

    def put(self, start: float, end: float) -> None:
        """Run something from `start`, as `first_gap` told it, to `end`. What takes no time parts the gap that it is in, too."""
        number = bisect_right(self._gaps, (start, float("inf"))) - 1
        if number >= 0 and start < self._gaps[number][1]:
            begin, over = self._gaps[number]
            self._gaps[number : number + 1] = [gap for gap in ((begin, start), (end, over)) if gap[0] < gap[1]]
        insort(self._starts, start)
        insort(self._ends, end)
