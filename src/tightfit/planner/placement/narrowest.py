"""Narrowest: ideals across which the least is sent, within windows of a linear order, each by one maximum flow.

Where too many ideals are there to look at all, those are the places where a split that pays for sending is cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tightfit.planner.placement.atoms import Atoms

_INSIDE, _OUTSIDE = 0, 1
_ALWAYS = 10**9  # capacity of what no cut may part; all outputs together have a fifth


def narrowest_ideals(atoms: Atoms, order: Sequence[int], width: int) -> list[int]:
    """For windows of so many atoms, a quarter apart: the ideal with the least crossing that holds all before it and nothing behind."""
    width = min(max(4, width), len(order))
    starts = range(0, len(order) - width + 1, max(1, width // 4))
    return list(dict.fromkeys(narrowest(atoms, order, start, start + width) for start in starts))


def narrowest(atoms: Atoms, order: Sequence[int], start: int, stop: int) -> int:
    """The ideal across which the least is sent, of those that hold the order up to `start` and nothing from `stop` on.

    A minimum cut: an output costs its seconds if some of its writer and readers are in and others out; a follower in needs what it follows.
    """
    import numpy as np
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    network = _network(atoms, order, start, stop)
    rows, columns, room = zip(*network.arcs, strict=True) if network.arcs else ((), (), ())
    shape = (network.nodes, network.nodes)
    matrix = csr_array((np.array(room, np.int32), (np.array(rows, np.int32), np.array(columns, np.int32))), shape=shape)
    left = matrix - maximum_flow(matrix, _INSIDE, _OUTSIDE).flow
    left.data[left.data < 0] = 0
    left.eliminate_zeros()
    reached = set(breadth_first_order(left, _INSIDE, return_predecessors=False).tolist())
    ahead = sum(1 << atom for atom in order[:start])
    return ahead | sum(1 << order[place] for place in range(start, stop) if 2 + place - start in reached)


@dataclass
class _Network:
    """Arcs and their capacities."""

    nodes: int
    arcs: list[tuple[int, int, int]] = field(default_factory=list)


def _network(atoms: Atoms, order: Sequence[int], start: int, stop: int) -> _Network:
    """Two ends, the atoms of the window, and two nodes for each output: one that any end in feeds, and one that feeds all ends."""
    node = {atom: _INSIDE if place < start else _OUTSIDE if place >= stop else 2 + place - start for place, atom in enumerate(order)}
    network = _Network(2 + stop - start)
    for atom in order[start:stop]:
        network.arcs += [(node[atom], node[source], _ALWAYS) for source in atoms.follows[atom] if node[source] != _INSIDE]
    scale = _ALWAYS / 5 / (sum(output.seconds for output in atoms.outputs) or 1.0)
    for output in atoms.outputs:
        ends = {node[atom] for atom in (output.writer, *output.readers)}
        room = int(output.seconds * scale)
        if len(ends) < 2 or ends == {_INSIDE, _OUTSIDE} or not room:
            continue
        some, every = network.nodes, network.nodes + 1
        network.nodes += 2
        network.arcs.append((some, every, room))
        network.arcs += [(end, some, _ALWAYS) for end in ends if end != _OUTSIDE]
        network.arcs += [(every, end, _ALWAYS) for end in ends if end != _INSIDE]
    return network
