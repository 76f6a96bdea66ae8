"""Squeeze: a placement that fits, where no algorithm found one: local search on the bytes by which devices are too full."""

import random
import time
from collections.abc import Iterator

from tightfit.planner.placement.memory import held
from tightfit.planner.placement.moves import Moves
from tightfit.planner.placement.orders import depth_first, ranks_of, urgent_first
from tightfit.planner.placement.pack import packings
from tightfit.planner.placement.simulate import run
from tightfit.planner.placement.times import Times, times
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placement

_REORDER = 0.3  # of all moves, those that change the order alone


def squeeze(graph: Graph, cluster: Cluster, evaluations: int = 5000, seconds: float = 5.0, seed: int = 0) -> Placement | None:
    """From the packing that overflows the least, by moves that do not overflow more; None where the search ends before all fits."""
    costs, until = times(graph, cluster), time.perf_counter() + seconds
    first = min(((sum(_over(graph, cluster, costs, one)), one) for one in _packed(graph, cluster, costs)), default=None, key=lambda x: x[0])
    if first is None:
        return None
    chance, placement = random.Random(seed), first[1]
    moves, over = Moves(graph, costs, chance), _over(graph, cluster, costs, first[1])
    for _ in range(evaluations):
        if not any(over) or time.perf_counter() > until:
            break
        changed = _changed(graph, cluster, moves, placement, over, chance)
        if changed is not None:
            now = _over(graph, cluster, costs, changed)
            if sum(now) <= sum(over):
                placement, over = changed, now
    return None if any(over) else placement


def _packed(graph: Graph, cluster: Cluster, costs: Times) -> Iterator[Placement]:
    for device_of in packings(graph, cluster):
        for order in (graph.order, depth_first(graph), urgent_first(graph, ranks_of(graph, costs, device_of))):
            yield Placement(tuple(device_of), order, "squeeze")


def _over(graph: Graph, cluster: Cluster, costs: Times, placement: Placement) -> list[int]:
    """Bytes by which each device is too full at its fullest."""
    clock = run(graph, cluster, costs, placement.device_of, placement.order)
    steps = held(graph, len(cluster.devices), placement.device_of, clock.start, clock.end, clock.sent)
    peaks = (max(size for _, size in on) for on in steps)
    return [max(0, peak - device.memory_bytes) for peak, device in zip(peaks, cluster.devices, strict=True)]


def _changed(
    graph: Graph, cluster: Cluster, moves: Moves, placement: Placement, over: list[int], chance: random.Random
) -> Placement | None:
    """A patch from or to a device that is too full, or another order."""
    home = [placement.device_of[members[0]] for members in graph.groups]
    if chance.random() < _REORDER:
        order = moves.shifted(placement.order, chance.randrange(len(placement.order)))
        return None if order is None else Placement(placement.device_of, tuple(order), placement.by)
    left = [device.memory_bytes for device in cluster.devices]
    for group, device in enumerate(home):
        left[device] -= moves.sizes[group]
    among = [group for group, device in enumerate(home) if over[device]] if chance.random() < 0.7 else range(len(home))
    homes, device_of = moves.patch(home, left, among), list(placement.device_of)
    for group, device in (homes or {}).items():
        for at in graph.groups[group]:
            device_of[at] = device
    return Placement(tuple(device_of), placement.order, placement.by) if homes else None
