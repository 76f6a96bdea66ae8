"""Paths: what hangs together, and how dear it is to cut a path where memory forces it."""

from collections import Counter, deque
from collections.abc import Sequence

from tightfit.planner.placement.orders import group_of
from tightfit.planner.placement.times import Times
from tightfit.terms.graph import Graph

_PRICES = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)  # of bytes in time: what the paths to be cut are the longest by


def parts(graph: Graph) -> list[set[int]]:
    """Operators that hang together, by edges and by groups."""
    lead = list(range(len(graph.operators)))

    def root(at: int) -> int:
        while lead[at] != at:
            lead[at] = lead[lead[at]]
            at = lead[at]
        return at

    pairs = [(members[0], at) for members in graph.groups for at in members[1:]]
    for one, other in (*graph.edges, *pairs):
        lead[root(one)] = root(other)
    found: dict[int, set[int]] = {}
    for at in range(len(lead)):
        found.setdefault(root(at), set()).add(at)
    return list(found.values())


def longest_path(graph: Graph, length: Sequence[float]) -> list[int]:
    """The path with the largest sum of `length`."""
    best, back = list(length), [-1] * len(length)
    for at in graph.order:
        for parent in graph.parents[at]:
            if best[parent] + length[at] > best[at]:
                best[at], back[at] = best[parent] + length[at], parent
    path = [max(range(len(best)), key=best.__getitem__)]
    while back[path[-1]] >= 0:
        path.append(back[path[-1]])
    return path[::-1]


def least_cut_seconds(graph: Graph, costs: Times, sizes: Sequence[int], room: int) -> float:
    """A lower bound on the makespan: some paths, each cut as cheaply as can be into pieces of at most `room` bytes at one moment.

    `sizes` is what each of `graph.groups` has then. Successive operators of a path are on one device, or send the output; so a path takes
    its work and its cuts.
    """
    run, send, group = costs.fastest_run, costs.fastest_send, group_of(graph)
    share = [sizes[group[at]] / len(graph.groups[group[at]]) for at in range(len(run))]
    price = sum(run) / max(1, sum(sizes))
    paths = {tuple(longest_path(graph, [r + factor * price * s for r, s in zip(run, share, strict=True)])) for factor in _PRICES}
    return max(sum(run[at] for at in path) + _cut(path, group, sizes, send, room) for path in paths)


def _cut(path: Sequence[int], group: Sequence[int], sizes: Sequence[int], send: Sequence[float], room: int) -> float:
    """The least seconds of transfers along `path`, when no piece of it has more than `room` bytes; groups count once in a piece."""
    inside, held = Counter[int](), 0
    first = 0  # of the longest piece that ends at the operator looked at
    least = deque([(0.0, 0)])  # rising seconds of what could be cut off before a piece, with the place of the piece's first operator
    for place, at in enumerate(path):
        inside[group[at]] += 1
        held += sizes[group[at]] if inside[group[at]] == 1 else 0
        while held > room and first < place:
            inside[group[path[first]]] -= 1
            held -= sizes[group[path[first]]] if not inside[group[path[first]]] else 0
            first += 1
        while least[0][1] < first:
            least.popleft()
        if place == len(path) - 1:
            break
        beyond = least[0][0] + send[at]
        while least and least[-1][0] >= beyond:
            least.pop()
        least.append((beyond, place + 1))
    return least[0][0]
