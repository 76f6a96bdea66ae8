"""Earliest: before when no operator can start, and what must come after it, when transfers take time. For bounds.

An operator's inputs are either computed on its own device, one after the other, or sent to it; whichever is chosen, it cannot start before
the better of the two (Papadimitriou and Yannakakis, SIAM J. Comput. 1990, here with unlike transfers).
"""

import heapq
from collections.abc import Callable, Sequence

from tightfit.planner.placement.times import Times
from tightfit.terms.graph import Graph

_MOST_NEAR = 400  # ancestors looked at for one operator; with more, the plain longest path stands


def earliest_starts(graph: Graph, costs: Times) -> list[float]:
    """Seconds before which no operator starts, in any placement on any number of devices."""
    send = costs.fastest_send
    return _starts(graph.order, graph.parents, costs.fastest_run, lambda parent, _child: send[parent])


def latest_tails(graph: Graph, costs: Times) -> list[float]:
    """Seconds that at least remain of the step after each operator's end."""
    send = costs.fastest_send
    return _starts(graph.order[::-1], graph.children, costs.fastest_run, lambda _child, parent: send[parent])


def _starts(
    order: Sequence[int], parents: Sequence[Sequence[int]], run: Sequence[float], crossing: Callable[[int, int], float]
) -> list[float]:
    place = {at: number for number, at in enumerate(order)}
    starts = [0.0] * len(run)
    for at in order:
        plain = max((starts[parent] + run[parent] for parent in parents[at]), default=0.0)
        near = _near(at, plain, place, parents, starts, run, crossing)
        starts[at] = max(plain, _best_choice(near)) if near else plain
    return starts


def _near(
    at: int,
    plain: float,
    place: dict[int, int],
    parents: Sequence[Sequence[int]],
    starts: Sequence[float],
    run: Sequence[float],
    crossing: Callable[[int, int], float],
) -> list[tuple[float, float, float, float]]:
    """Ancestors that would hold `at` up beyond `plain` from another device, the worst first.

    Of each: until when it would, its start, its work, and the longest work between its end and `at`.
    """
    after, across = {at: 0.0}, {}  # by ancestor, from its end: longest work to `at`; the same if a transfer lies somewhere between
    found, heap = [], [(-place[at], at)]
    while heap:
        _, child = heapq.heappop(heap)
        if child != at:
            late = starts[child] + run[child] + across[child]
            if late <= plain:
                continue
            found.append((late, starts[child], run[child], after[child]))
            if len(found) > _MOST_NEAR:
                return []
        own = 0.0 if child == at else run[child]
        for parent in parents[child]:
            if parent not in across:
                heapq.heappush(heap, (-place[parent], parent))
            here = crossing(parent, child) + own + after[child]
            later = here if child == at else own + across[child]
            across[parent] = max(across.get(parent, 0.0), min(here, later))
            after[parent] = max(after.get(parent, 0.0), own + after[child])
    return sorted(found, reverse=True)


def _best_choice(near: Sequence[tuple[float, float, float, float]]) -> float:
    """The least start when the first so many of `near` are on the operator's own device and the next one is not."""
    low, high = 0, len(near)  # own device: late when many; elsewhere: late when few
    while low < high:
        middle = (low + high) // 2
        if _one_after_the_other(near[:middle]) >= near[middle][0]:
            high = middle
        else:
            low = middle + 1
    choices = [(kept, near[kept][0] if kept < len(near) else 0.0) for kept in (low - 1, low) if kept >= 0]
    return min(max(_one_after_the_other(near[:kept]), elsewhere) for kept, elsewhere in choices)


def _one_after_the_other(jobs: Sequence[tuple[float, float, float, float]]) -> float:
    """The least end of all on one device, each from its start on and with what follows it: Jackson's preemptive rule, a lower bound."""
    jobs = sorted(jobs, key=lambda job: job[1])
    waiting: list[tuple[float, float]] = []  # what follows (negative), work left
    now, end, number = 0.0, 0.0, 0
    while number < len(jobs) or waiting:
        if not waiting:
            now = max(now, jobs[number][1])
        while number < len(jobs) and jobs[number][1] <= now:
            heapq.heappush(waiting, (-jobs[number][3], jobs[number][2]))
            number += 1
        follows, left = heapq.heappop(waiting)
        until = jobs[number][1] if number < len(jobs) else float("inf")
        if now + left > until:
            heapq.heappush(waiting, (follows, left - (until - now)))
            now = until
        else:
            now += left
            end = max(end, now - follows)
    return end
