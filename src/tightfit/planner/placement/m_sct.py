"""m-SCT: earliest task first, where an idle device may wait for the favourite child of what it ran last (Baechi, SoCC 2020)."""

import heapq
from collections.abc import Iterator, Sequence

from tightfit.planner.placement.favourites import favourite_children
from tightfit.planner.placement.orders import depth_first, places
from tightfit.planner.placement.pack import first_that_fits, packings
from tightfit.planner.placement.progress import Progress
from tightfit.planner.placement.ready import Ready, Start
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placement

_MOST_LOOKED_AT = 32  # ready operators, to find one that is urgent: with more, an awake device costs more than it saves


def m_sct(graph: Graph, cluster: Cluster) -> Placement | None:
    """Small-communication-time scheduling within memory: a placement that fits, or None where none was found.

    Where that gets stuck for want of memory, the groups are packed into the devices first, as in `m_etf`.
    """
    return first_that_fits(graph, cluster, _attempts(graph, cluster, favourite_children(graph, cluster)))


def small_communication_time(
    graph: Graph, cluster: Cluster, favourites: Sequence[int], priority: Sequence[float], pinned: Sequence[int] | None = None
) -> Placement | None:
    """List scheduling with awake devices; None where the rest fits on no device.

    After an operator whose favourite child is ready and can nowhere start earlier, the device is awake: it waits for that child, and
    meanwhile starts only what is urgent, that is, could by then start on every device it may go to.
    """
    progress = Progress(graph, cluster, pinned)
    ready = Ready(progress, priority)
    urgent = _Urgent(progress, ready)
    last, now = [-1] * len(cluster.devices), 0.0
    while True:
        starts = []
        for device, before in enumerate(last):
            awaited = _awaited(progress, ready, favourites[before], device, now) if before >= 0 else None
            start = ready.on(device) if awaited is None else min(awaited, urgent.on(device, awaited.start) or awaited)
            if start is not None:
                starts.append(start)
        if not starts:
            break
        first = min(starts)
        progress.put(first.operator, first.device, first.start)
        urgent.admit(ready.after(first.operator))
        last[first.device], now = first.operator, first.start
    return progress.placement("m-SCT") if len(progress.order) == len(graph.operators) else None


def _awaited(progress: Progress, ready: Ready, favourite: int, device: int, now: float) -> Start | None:
    """When the favourite can start on `device`, if the device is awake for it."""
    if favourite < 0 or not ready.is_ready(favourite):
        return None
    seen = max(now, progress.free[device])
    if any(progress.end[parent] > seen for parent in progress.graph.parents[favourite]):
        return None
    start = progress.earliest(favourite, device)
    if not progress.fits(favourite, device, start):
        return None
    if any(progress.earliest(favourite, other) < start for other in progress.devices(favourite)):
        return None
    return Start(start, -1.0, start + progress.costs.run[device][favourite], device, favourite)


class _Urgent:
    """Ready operators by the time when their inputs have reached every device that they may go to."""

    def __init__(self, progress: Progress, ready: Ready) -> None:
        self._progress, self._ready = progress, ready
        self._everywhere: list[tuple[float, int]] = []
        self.admit([at for at in progress.graph.order if ready.is_ready(at)])

    def admit(self, operators: Sequence[int]) -> None:
        """These have become ready."""
        for at in operators:
            devices = self._progress.devices(at)
            if devices:
                heapq.heappush(self._everywhere, (max(self._progress.arrival(at, device) for device in devices), at))

    def on(self, device: int, before: float) -> Start | None:
        """What is the first to be urgent `before` the awaited child starts on `device`."""
        progress, looked_at, found = self._progress, [], None
        while found is None and self._everywhere and self._everywhere[0][0] < before and len(looked_at) < _MOST_LOOKED_AT:
            at = self._everywhere[0][1]
            looked_at.append(heapq.heappop(self._everywhere))
            if progress.device_of[at] >= 0:
                looked_at.pop()
                continue
            start = max((progress.earliest(at, other) for other in progress.devices(at)), default=before)
            if start < before and progress.fits(at, device, start):
                found = Start(start, self._ready.priority[at], start + progress.costs.run[device][at], device, at)
        for entry in looked_at:
            heapq.heappush(self._everywhere, entry)
        return found


def _attempts(graph: Graph, cluster: Cluster, favourites: Sequence[int]) -> Iterator[Placement | None]:
    priority, deep = places(graph.order), depth_first(graph)
    yield small_communication_time(graph, cluster, favourites, priority)
    for pinned in packings(graph, cluster):
        yield small_communication_time(graph, cluster, favourites, priority, pinned)
        yield small_communication_time(graph, cluster, favourites, places(deep), pinned)
        yield Placement(tuple(pinned), deep, "m-SCT")
