"""Paper: what Baechi does with a graph before and after it places it (SoCC 2020, section 4): forward only, co-placed, fused."""

from tightfit.planner.placement.graph import co_placed, forward_only, fused
from tightfit.planner.placement.simulate import fits, simulate
from tightfit.planner.placement.starts import BAECHI
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placement

_PARTS = 32


def as_in_paper(graph: Graph, cluster: Cluster, algorithm: str) -> tuple[Placement | None, int]:
    """What one of the paper's algorithms (`m-TOPO`, `m-ETF`, `m-SCT`) finds for the smaller graph, told for the whole one.

    None where it finds nothing that fits. Beside it, how many operators the smaller graph has. A chain of single readers would be one
    group, so groups stop growing at a part of the least device's memory and of the work.
    """
    training = any(operator.backward for operator in graph.operators)
    front = forward_only(graph) if training else None
    least = min(device.memory_bytes for device in cluster.devices)
    small = fused(co_placed(front.graph if front else graph, least / _PARTS, graph.seconds / _PARTS))
    found = BAECHI[algorithm](small.graph, cluster)
    if found is None:
        return None, len(small.members)
    found = small.expand(found)
    found = front.expand(found) if front else found
    return (found if fits(cluster, simulate(graph, cluster, found)) else None), len(small.members)
