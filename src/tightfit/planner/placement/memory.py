"""Memory: what a device holds over time: of a schedule that is known, and of one that still grows."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph

_MOST_STEPS = 128  # of a block, before it is cut in two: adding and asking walk through at most so many, and through the blocks


def inside(cluster: Cluster, held_bytes: Iterable[int]) -> bool:
    """No device holds more than its memory; `held_bytes` is what each holds at most."""
    return all(held <= device.memory_bytes for held, device in zip(held_bytes, cluster.devices, strict=True))


def lasting_bytes(graph: Graph) -> list[int]:
    """What each operator leaves on its device to the end of the step: weights, what is kept, and a result that nobody reads."""
    return [
        one.weight_bytes + one.kept_bytes + (0 if children else one.output_bytes)
        for one, children in zip(graph.operators, graph.children, strict=True)
    ]


def bytes_at_peak(graph: Graph, order: Sequence[int]) -> list[int]:
    """What each operator has on the one device that runs all in `order`, at the moment when that holds the most; weights included."""
    place = {at: number for number, at in enumerate(order)}
    until = [max((place[child] for child in children), default=len(order)) for children in graph.children]
    change = [0] * (len(order) + 2)
    for at, one in enumerate(graph.operators):
        change[place[at]] += one.kept_bytes + one.temporary_bytes + one.output_bytes
        change[place[at] + 1] -= one.temporary_bytes
        change[until[at] + 1] -= one.output_bytes
    sums = list(accumulate(change[: len(order)]))
    peak = max(range(len(order)), key=sums.__getitem__)
    return [
        one.weight_bytes
        + (one.kept_bytes if place[at] <= peak else 0)
        + (one.temporary_bytes if place[at] == peak else 0)
        + (one.output_bytes if place[at] <= peak <= until[at] else 0)
        for at, one in enumerate(graph.operators)
    ]


def held(
    graph: Graph,
    devices: int,
    device_of: Sequence[int],
    start: Sequence[float],
    end: Sequence[float],
    sent: Mapping[tuple[int, int], tuple[float, float]],
) -> tuple[tuple[tuple[float, int], ...], ...]:
    """By device: (from this second on, so many bytes), as `simulate` defines it."""
    changes: list[dict[float, int]] = [{0.0: 0} for _ in range(devices)]

    def change(device: int, when: float, size: int) -> None:
        changes[device][when] = changes[device].get(when, 0) + size

    until: dict[tuple[int, int], float] = {}  # by output and device
    for (at, _), (_, over) in sent.items():
        until[at, device_of[at]] = max(over, until.get((at, device_of[at]), 0.0))
    for at, device in enumerate(device_of):
        for parent in graph.parents[at]:
            until[parent, device] = max(end[at], until.get((parent, device), 0.0))
    for at, (one, device) in enumerate(zip(graph.operators, device_of, strict=True)):
        change(device, 0.0, one.weight_bytes)
        change(device, start[at], one.kept_bytes + one.temporary_bytes + one.output_bytes)
        change(device, end[at], -one.temporary_bytes)
    for (at, device), (begin, _) in sent.items():
        change(device, begin, graph.operators[at].output_bytes)
    for (at, device), over in until.items():
        change(device, over, -graph.operators[at].output_bytes)
    return tuple(_steps(by_time) for by_time in changes)


def _steps(changes: Mapping[float, int]) -> tuple[tuple[float, int], ...]:
    steps, now = [], 0
    for when in sorted(changes):
        if changes[when] or not steps:
            now += changes[when]
            steps.append((when, now))
    return tuple(steps)


class Profile:
    """What one device holds over time, while a schedule grows: a step function that changes at any time, kept in blocks of steps.

    Asking about a time near the end is cheap, as list scheduling mostly does.
    """

    def __init__(self) -> None:
        self._first = [float("-inf")]  # no time of a block lies before its first
        self._times: list[list[float]] = [[]]
        self._changes: list[list[int]] = [[]]
        self._sums = [0]
        self._tops = [0]  # the most that a block's first changes add up to, or zero
        self._total = 0
        self._highest: int | None = 0  # of all times; None: not known since the last change

    def add(self, when: float, size: int) -> None:
        """From `when` on, `size` bytes more (or fewer)."""
        if not size:
            return
        block = bisect_right(self._first, when) - 1
        times, changes = self._times[block], self._changes[block]
        at = bisect_left(times, when)
        if at < len(times) and times[at] == when:
            changes[at] += size
        else:
            times.insert(at, when)
            changes.insert(at, size)
        self._total += size
        self._highest = None
        if len(times) > _MOST_STEPS:
            half = len(times) // 2
            self._first.insert(block + 1, times[half])
            self._times.insert(block + 1, times[half:])
            self._changes.insert(block + 1, changes[half:])
            self._sums.insert(block + 1, 0)
            self._tops.insert(block + 1, 0)
            del times[half:], changes[half:]
            self._measure(block + 1)
        self._measure(block)

    def at(self, when: float) -> int:
        """Bytes at `when`, with all that changes at it."""
        return self._until(when)[0]

    @property
    def peak(self) -> int:
        """The most bytes at any time."""
        if self._highest is None:
            self._highest = self.highest(float("-inf"))
        return self._highest

    def highest(self, since: float) -> int:
        """The most bytes at `since` or later."""
        now, block, at = self._until(since)
        top = now
        for size in self._changes[block][at:]:
            now += size
            if now > top:
                top = now
        for later in range(block + 1, len(self._sums)):
            top = max(top, now + self._tops[later])
            now += self._sums[later]
        return top

    def _until(self, when: float) -> tuple[int, int, int]:
        """Bytes at `when`, and the block and the place in it of the first change after."""
        block = bisect_right(self._first, when) - 1
        at = bisect_right(self._times[block], when)
        return self._total - sum(self._sums[block + 1 :]) - sum(self._changes[block][at:]), block, at

    def _measure(self, block: int) -> None:
        changes = self._changes[block]
        self._sums[block] = sum(changes)
        self._tops[block] = max(0, max(accumulate(changes), default=0))
