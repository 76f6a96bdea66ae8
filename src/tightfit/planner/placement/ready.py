"""Ready: operators whose inputs are all placed, and when each could start on each device. What a list scheduler chooses from."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from tightfit.planner.placement.progress import Progress


class Start(NamedTuple):
    """An operator that could start on a device; the smallest is to start first."""

    start: float
    priority: float
    end: float
    device: int
    operator: int


class Ready:
    """For each device a heap of what waits for its inputs, by arrival, and one of what could start at once, by priority.

    No start is ever earlier than it was said before, so only the tops need to be looked at again.
    """

    def __init__(self, progress: Progress, priority: Sequence[float]) -> None:
        self._progress, self.priority = progress, priority
        self._unplaced = [len(parents) for parents in progress.graph.parents]
        count = len(progress.cluster.devices)
        self._waiting: list[list[tuple[float, float, int]]] = [[] for _ in range(count)]  # arrival, priority, operator
        self._open: list[list[tuple[float, int]]] = [[] for _ in range(count)]  # priority, operator
        self._too_large: list[list[int]] = [[] for _ in range(count)]  # until the device holds less
        for at in progress.graph.order:
            if not self._unplaced[at]:
                self._admit(at)

    def after(self, placed: int) -> list[int]:
        """The operators that become ready as `placed` is."""
        found = []
        for child in self._progress.graph.children[placed]:
            self._unplaced[child] -= 1
            if not self._unplaced[child]:
                self._admit(child)
                found.append(child)
        return found

    def is_ready(self, at: int) -> bool:
        """All inputs are placed, and it is not."""
        return not self._unplaced[at] and self._progress.device_of[at] < 0

    def earliest(self) -> Start | None:
        """What can start first on any device, and stays inside its memory; None where nothing can."""
        return min((start for device in range(len(self._open)) if (start := self.on(device))), default=None)

    def on(self, device: int) -> Start | None:
        """What can start first on `device`."""
        progress = self._progress
        free, costs = progress.free[device], progress.costs.run[device]
        waiting, at_once = self._waiting[device], self._open[device]
        if device in progress.changed:
            progress.changed.discard(device)
            for at in self._too_large[device]:
                heapq.heappush(waiting, (progress.arrival(at, device), self.priority[at], at))
            self._too_large[device].clear()
        while waiting or at_once:
            while waiting and waiting[0][0] <= free:
                heapq.heappush(at_once, heapq.heappop(waiting)[1:])
            start, at = (free, at_once[0][1]) if at_once else (waiting[0][0], waiting[0][2])
            if not self._leaves(at, device, start):
                return Start(start, self.priority[at], start + costs[at], device, at)
            if at_once:
                heapq.heappop(at_once)
            else:
                heapq.heappop(waiting)
        return None

    def _leaves(self, at: int, device: int, start: float) -> bool:
        """Whether the top of a heap is no candidate at `start`: placed, bound elsewhere, later than was thought, or too large."""
        progress = self._progress
        if progress.device_of[at] >= 0 or not progress.may(at, device):
            return True
        if progress.cluster.serial and (arrival := progress.arrival(at, device)) > start:
            heapq.heappush(self._waiting[device], (arrival, self.priority[at], at))
            return True
        if not progress.fits(at, device, start):
            self._too_large[device].append(at)
            return True
        return False

    def _admit(self, at: int) -> None:
        for device in self._progress.devices(at):
            heapq.heappush(self._waiting[device], (self._progress.arrival(at, device), self.priority[at], at))
