"""m-TOPO: operators in topological order, one device after the other, each filled to a cap (Baechi, SoCC 2020)."""

from collections.abc import Iterator, Sequence

from tightfit.planner.placement.orders import depth_first, group_of
from tightfit.planner.placement.pack import first_that_fits, group_bytes, packings
from tightfit.planner.placement.progress import Progress
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placement


def m_topo(graph: Graph, cluster: Cluster) -> Placement | None:
    """The topological split: a placement that fits, or None where none was found.

    First with the paper's cap: each device's share of what lasts, in proportion to its memory, and the largest group. Where operators
    remain, or one does not fit, each device is filled to its real limit (the paper's variant for unlike devices); then the operators of
    the groups that are packed by weight alone run in topological order.
    """
    return first_that_fits(graph, cluster, _attempts(graph, cluster))


def caps(graph: Graph, cluster: Cluster) -> list[float]:
    """Bytes up to which each device is filled: its share in proportion to memory, and the largest group."""
    sizes, memory = group_bytes(graph), sum(device.memory_bytes for device in cluster.devices)
    return [sum(sizes) * device.memory_bytes / max(1, memory) + max(sizes) for device in cluster.devices]


def _attempts(graph: Graph, cluster: Cluster) -> Iterator[Placement | None]:
    yield fill(graph, cluster, graph.order, caps(graph, cluster))
    endless = [float("inf")] * len(cluster.devices)
    for order in (graph.order, depth_first(graph)):
        yield fill(graph, cluster, order, endless)
    for pinned in packings(graph, cluster):
        for order in (graph.order, depth_first(graph)):
            yield Placement(tuple(pinned), order, "m-TOPO")


def fill(graph: Graph, cluster: Cluster, order: Sequence[int], cap: Sequence[float]) -> Placement | None:
    """The split of `order`: to the next device when an operator's group would exceed the cap or the memory, and never back.

    None if operators remain after the last device.
    """
    progress, sizes, group = Progress(graph, cluster), group_bytes(graph), group_of(graph)
    device, filled = 0, 0
    for at in order:
        home = progress.home_of(at)
        if home >= 0:
            start = progress.earliest(at, home)
            if not progress.fits(at, home, start):
                return None
            progress.put(at, home, start)
            continue
        while True:
            start = progress.earliest(at, device)
            if filled + sizes[group[at]] <= cap[device] and progress.fits(at, device, start):
                break
            device, filled = device + 1, 0
            if device == len(cluster.devices):
                return None
        filled += sizes[group[at]]
        progress.put(at, device, start)
    return progress.placement("m-TOPO")
