"""Cuts: a line of groups cut into as few and as cheap pieces as memory asks for, one device after the other."""

from collections import deque
from collections.abc import Sequence

from tightfit.planner.placement.orders import group_of
from tightfit.planner.placement.times import Times
from tightfit.terms.graph import Graph


def cheapest_cuts(graph: Graph, costs: Times, line: Sequence[int], sizes: Sequence[int], rooms: Sequence[float]) -> list[int] | None:
    """The device of each group when `line` is cut so that the transfers over all cuts take the fewest seconds; None where no cut fits.

    `sizes` is what each of `graph.groups` takes of a device's room. Exact for the line, and for devices in their order, any of which may
    stay empty. It does not know what runs at one time.
    """
    over = _seconds_over(graph, costs, line)
    filled = [0]
    for group in line:
        filled.append(filled[-1] + sizes[group])
    count, endless = len(line), float("inf")
    best = [0.0] + [endless] * count  # the cheapest way to have so many groups on the devices so far
    began: list[list[int]] = []  # by device and groups so far: where its piece begins
    for room in rooms:
        then, begin, least, added = list(best), list(range(count + 1)), deque[int](), 0
        for upto in range(1, count + 1):
            while added < upto:  # a piece that begins at `added` pays the cut before it
                while least and best[least[-1]] + over[least[-1]] >= best[added] + over[added]:
                    least.pop()
                least.append(added)
                added += 1
            while least and filled[upto] - filled[least[0]] > room:
                least.popleft()
            if least and best[least[0]] + over[least[0]] < then[upto]:
                then[upto], begin[upto] = best[least[0]] + over[least[0]], least[0]
        best = then
        began.append(begin)
    if best[count] == endless:
        return None
    homes, upto = [0] * len(sizes), count
    for device in reversed(range(len(rooms))):
        for place in range(began[device][upto], upto):
            homes[line[place]] = device
        upto = began[device][upto]
    return homes


def _seconds_over(graph: Graph, costs: Times, line: Sequence[int]) -> list[float]:
    """For each place in the line: seconds to send what is made on one side of a cut before it, and read on the other."""
    group, send = group_of(graph), costs.typical_send
    place = {number: at for at, number in enumerate(line)}
    change = [0.0] * (len(line) + 2)
    for at, children in enumerate(graph.children):
        ends = [place[group[at]], *(place[group[child]] for child in children)]
        change[min(ends) + 1] += send[at]
        change[max(ends) + 1] -= send[at]
    over, now = [], 0.0
    for step in change:
        now += step
        over.append(max(0.0, now))
    over[0] = 0.0
    return over
