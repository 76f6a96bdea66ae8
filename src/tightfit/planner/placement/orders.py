"""Orders: sequences in which operators can run, each after what it reads; and how urgent each one is."""

import heapq
from collections.abc import Callable, Sequence

from tightfit.planner.placement.times import Times
from tightfit.terms.graph import Graph


def places(order: Sequence[int]) -> list[int]:
    """The place of each operator in `order`."""
    found = [0] * len(order)
    for place, at in enumerate(order):
        found[at] = place
    return found


def group_of(graph: Graph) -> list[int]:
    """The number in `graph.groups` of each operator's group."""
    numbers = [0] * len(graph.operators)
    for number, members in enumerate(graph.groups):
        for at in members:
            numbers[at] = number
    return numbers


def depth_first(graph: Graph) -> tuple[int, ...]:
    """What was made last is read first, so that few outputs wait for their readers."""
    waits = [len(parents) for parents in graph.parents]
    stack = [at for at in reversed(graph.order) if not waits[at]]
    order = []
    while stack:
        at = stack.pop()
        order.append(at)
        for child in reversed(graph.children[at]):
            waits[child] -= 1
            if not waits[child]:
                stack.append(child)
    return tuple(order)


def topological(graph: Graph, rank: Callable[[int], tuple[int, int]]) -> tuple[int, ...]:
    """The topological order that takes what is ready by least `rank`."""
    waits = [len(parents) for parents in graph.parents]
    ready = [(rank(at), at) for at, count in enumerate(waits) if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        _, at = heapq.heappop(ready)
        order.append(at)
        for child in graph.children[at]:
            waits[child] -= 1
            if not waits[child]:
                heapq.heappush(ready, (rank(child), child))
    return tuple(order)


def upward_ranks(graph: Graph, costs: Times) -> list[float]:
    """Seconds from each operator's start to the end of the step, with every output sent (HEFT, Topcuoglu et al. 2002, section 4.1)."""
    run, send = costs.typical_run, costs.typical_send
    ranks = [0.0] * len(graph.operators)
    for at in reversed(graph.order):
        ranks[at] = run[at] + max((send[at] + ranks[child] for child in graph.children[at]), default=0.0)
    return ranks


def ranks_of(graph: Graph, costs: Times, device_of: Sequence[int]) -> list[float]:
    """Seconds from each operator's start to the end of the step, where it is placed, if no device were ever busy."""
    ranks = [0.0] * len(graph.operators)
    for at in reversed(graph.order):
        sends, rest = costs.send[device_of[at]], 0.0
        for child in graph.children[at]:
            rest = max(rest, sends[device_of[child]][at] + ranks[child])
        ranks[at] = costs.run[device_of[at]][at] + rest
    return ranks


def urgent_first(graph: Graph, ranks: Sequence[float]) -> tuple[int, ...]:
    """By falling rank. Ranks rise from reader to what it reads, and equals stay in topological order; so the whole is one."""
    return tuple(sorted(graph.order, key=lambda at: -ranks[at]))


def heads(graph: Graph, run: Sequence[float]) -> list[float]:
    """No operator can start before: the longest path of work that leads to it."""
    found = [0.0] * len(run)
    for at in graph.order:
        found[at] = max((found[parent] + run[parent] for parent in graph.parents[at]), default=0.0)
    return found


def tails(graph: Graph, run: Sequence[float]) -> list[float]:
    """What must run after each operator: the longest path of work that leads away from it."""
    found = [0.0] * len(run)
    for at in reversed(graph.order):
        found[at] = max((run[child] + found[child] for child in graph.children[at]), default=0.0)
    return found
