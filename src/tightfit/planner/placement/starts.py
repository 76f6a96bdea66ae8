"""Starts: every way at hand to a first placement, by name."""

from collections.abc import Iterator, Sequence

from tightfit.planner.placement.cuts import cheapest_cuts
from tightfit.planner.placement.heft import heft
from tightfit.planner.placement.m_etf import m_etf
from tightfit.planner.placement.m_sct import m_sct
from tightfit.planner.placement.m_topo import m_topo
from tightfit.planner.placement.memory import bytes_at_peak
from tightfit.planner.placement.orders import depth_first, ranks_of, upward_ranks, urgent_first
from tightfit.planner.placement.pack import SHARES, by_operator, first_that_fits, group_bytes, line_of
from tightfit.planner.placement.simulate import simulate
from tightfit.planner.placement.squeeze import squeeze
from tightfit.planner.placement.times import Times, times
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placement

BAECHI = {"m-TOPO": m_topo, "m-ETF": m_etf, "m-SCT": m_sct}
"""The paper's three, by the paper's names."""

_MOST_EDGES = 30_000
"""For m-SCT, whose linear program takes a minute there."""


def starts(graph: Graph, cluster: Cluster) -> dict[str, Placement | None]:
    """Placements that fit, by what was asked; None from who found none. Only where nobody found one is `squeeze` asked."""
    asked = {**BAECHI, "HEFT": heft, "cuts": cut, "one device": one_device}
    ways = {name: way for name, way in asked.items() if name != "m-SCT" or len(graph.edges) <= _MOST_EDGES}
    found = {name: way(graph, cluster) for name, way in ways.items()}
    return found if any(found.values()) else {**found, "squeeze": squeeze(graph, cluster)}


def cut(graph: Graph, cluster: Cluster) -> Placement | None:
    """The best of the cheapest cuts through some lines of groups, each device then running the most urgent first.

    Where what runs does not fit beside what lasts, the cuts are made by what is there at the peak, with more and more room to spare.
    """
    costs = times(graph, cluster)
    orders = (graph.order, depth_first(graph), urgent_first(graph, upward_ranks(graph, costs)))
    found = (first_that_fits(graph, cluster, _cut_along(graph, cluster, costs, order)) for order in orders)
    return min((one for one in found if one is not None), key=lambda one: simulate(graph, cluster, one).makespan, default=None)


def _cut_along(graph: Graph, cluster: Cluster, costs: Times, order: Sequence[int]) -> Iterator[Placement]:
    line, lasts = line_of(graph, order), group_bytes(graph)
    at_peak = [max(sizes) for sizes in zip(lasts, group_bytes(graph, bytes_at_peak(graph, order)), strict=True)]
    for sizes, share in ((lasts, 1.0), *((at_peak, share) for share in SHARES)):
        homes = cheapest_cuts(graph, costs, line, sizes, [device.memory_bytes * share for device in cluster.devices])
        if homes is not None:
            device_of = by_operator(graph, homes)
            for runs in (urgent_first(graph, ranks_of(graph, costs, device_of)), tuple(order)):
                yield Placement(tuple(device_of), runs, "cuts")


def one_device(graph: Graph, cluster: Cluster) -> Placement | None:
    """All on one device, the fastest first; None where it fits on none."""
    fastest = sorted(range(len(cluster.devices)), key=lambda number: -cluster.devices[number].speed)
    orders = (graph.order, depth_first(graph))
    ways = (Placement((number,) * len(order), order, "one device") for number in fastest for order in orders)
    return first_that_fits(graph, cluster, ways)
