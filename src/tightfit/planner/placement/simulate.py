"""Simulate: what a placement gives. The one truth by which all that looks for placements is judged.

A device runs its operators in the placement's order, each as soon as its inputs are there. An output travels once to each other device
that reads it. It does not know where a placement comes from, nor how long finding it took.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from tightfit.planner.placement.memory import held, inside
from tightfit.planner.placement.times import Times, times
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placement, Schedule, Transfer


@dataclass(frozen=True)
class Clock:
    """When what runs and travels, in seconds; `sent` by operator and receiving device: when the transfer starts and ends."""

    start: list[float]
    end: list[float]
    sent: dict[tuple[int, int], tuple[float, float]]

    @property
    def makespan(self) -> float:
        """Seconds to the end of the last operator."""
        return max(self.end)


def simulate(graph: Graph, cluster: Cluster, placement: Placement) -> Schedule:
    """The step that `placement` gives: Baechi's execution simulator (SoCC 2020), in its parallel and its serial version.

    Parallel: a transfer starts when its operator ends, and none disturbs another. `cluster.serial`: each device has one channel, which
    sends or receives one tensor at a time; transfers queue in the order in which their operators end (ties: place in the order, then
    receiving device), and one holds both channels for its time.
    Memory over time: weights from 0 on; what is kept from an operator's start on; what is temporary while it runs; an output where it was
    made from the operator's start until its last reader there and its last transfer end (for good, if nobody reads it: it is the result),
    and where it is sent from the transfer's start until the last reader there ends. What ends at a moment does not count at it.
    """
    clock = run(graph, cluster, times(graph, cluster), placement.device_of, placement.order)
    transfers = (Transfer(at, placement.device_of[at], target, *when) for (at, target), when in clock.sent.items())
    return Schedule(
        start=tuple(clock.start),
        end=tuple(clock.end),
        transfers=tuple(sorted(transfers, key=lambda transfer: (transfer.start, transfer.end, transfer.operator, transfer.target))),
        memory=held(graph, len(cluster.devices), placement.device_of, clock.start, clock.end, clock.sent),
    )


def fits(cluster: Cluster, schedule: Schedule) -> bool:
    """No device ever holds more than its memory."""
    return inside(cluster, schedule.peak_bytes)


def run(graph: Graph, cluster: Cluster, costs: Times, device_of: Sequence[int], order: Sequence[int]) -> Clock:
    """The clock of `simulate` without its memory: for searches that ask for thousands of makespans."""
    assert len(device_of) == len(order) == len(graph.operators), "a placement names each operator once"
    return (_queueing if cluster.serial else _undisturbed)(graph, costs, device_of, order)


def _undisturbed(graph: Graph, costs: Times, device_of: Sequence[int], order: Sequence[int]) -> Clock:
    start, end = [0.0] * len(order), [-1.0] * len(order)
    free = [0.0] * len(costs.run)
    sent: dict[tuple[int, int], tuple[float, float]] = {}
    for at in order:
        device = device_of[at]
        begin = free[device]
        for parent in graph.parents[at]:
            there = end[parent]
            assert there >= 0, "an operator stands before what it reads"
            source = device_of[parent]
            if source != device:
                there += costs.send[source][device][parent]
                sent[parent, device] = (end[parent], there)
            if there > begin:
                begin = there
        start[at], end[at] = begin, begin + costs.run[device][at]
        free[device] = end[at]
    return Clock(start, end, sent)


def _queueing(graph: Graph, costs: Times, device_of: Sequence[int], order: Sequence[int]) -> Clock:
    start, end = [0.0] * len(order), [-1.0] * len(order)
    free, channel, arrived = [0.0] * len(costs.run), [0.0] * len(costs.run), [0.0] * len(order)
    sent: dict[tuple[int, int], tuple[float, float]] = {}
    place = {at: number for number, at in enumerate(order)}
    lines = [[at for at in order if device_of[at] == device][::-1] for device in range(len(costs.run))]
    missing = [len(parents) for parents in graph.parents]
    ends: list[tuple[float, int, int]] = []  # operators whose end is known, and whose transfers are not yet queued
    _start_what_can(range(len(lines)), lines, missing, arrived, free, costs, start, end, ends, place)
    while ends:
        now, _, at = heapq.heappop(ends)
        source, touched = device_of[at], {device_of[at]}
        for target in sorted({device_of[child] for child in graph.children[at]} - touched):
            begin = max(now, channel[source], channel[target])
            channel[source] = channel[target] = begin + costs.send[source][target][at]
            sent[at, target] = (begin, channel[target])
            touched.add(target)
        for child in graph.children[at]:
            missing[child] -= 1
            arrived[child] = max(arrived[child], now if device_of[child] == source else sent[at, device_of[child]][1])
        _start_what_can(sorted(touched), lines, missing, arrived, free, costs, start, end, ends, place)
    assert not any(lines), "an operator stands before what it reads"
    return Clock(start, end, sent)


def _start_what_can(
    devices: Sequence[int],
    lines: list[list[int]],
    missing: list[int],
    arrived: list[float],
    free: list[float],
    costs: Times,
    start: list[float],
    end: list[float],
    ends: list[tuple[float, int, int]],
    place: dict[int, int],
) -> None:
    """The first of each line starts, as far as all of its inputs have a time of arrival."""
    for device in devices:
        line = lines[device]
        while line and not missing[line[-1]]:
            at = line.pop()
            start[at] = max(free[device], arrived[at])
            free[device] = end[at] = start[at] + costs.run[device][at]
            heapq.heappush(ends, (end[at], place[at], at))
