"""Atoms: what goes to one device as a whole, and the outputs that pass between atoms."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from tightfit.planner.placement.load import flow
from tightfit.terms.cluster import Cluster, Link
from tightfit.terms.graph import Graph, Operator


@dataclass(frozen=True)
class Output:
    """Outputs of one atom that the same other atoms read, together."""

    writer: int
    readers: tuple[int, ...]  # atoms besides the writer
    seconds: float  # to send them once
    written_bytes: int  # on the writer's stage, beyond what the writer holds
    read_bytes: int  # on another stage that reads them


@dataclass(frozen=True)
class Atoms:
    """A graph in pieces that cannot be parted: by number, what each takes and which it must follow."""

    members: tuple[tuple[int, ...], ...]  # operators
    seconds: tuple[float, ...]  # on a device of speed 1
    held_bytes: tuple[int, ...]  # at once, with all other atoms of the stage: weights, what is kept, outputs that wait for the backward
    inside_bytes: tuple[int, ...]  # other outputs that no other atom reads
    temporary_bytes: int  # the most of any operator
    all_bytes: int  # what no stage exceeds: all that is held, all outputs, and the most temporary memory
    outputs: tuple[Output, ...]
    follows: tuple[tuple[int, ...], ...]  # atoms that must lie on the same stage or an earlier one

    @cached_property
    def followers(self) -> tuple[tuple[int, ...], ...]:
        """The atoms that must lie on the same stage as each one, or on a later one."""
        found: list[list[int]] = [[] for _ in self.members]
        for target, sources in enumerate(self.follows):
            for source in sources:
                found[source].append(target)
        return tuple(tuple(targets) for targets in found)

    def spread(self, device_of: Sequence[int]) -> tuple[int, ...]:
        """The device of each operator, from the device of each atom."""
        found = {at: device_of[atom] for atom, members in enumerate(self.members) for at in members}
        return tuple(found[at] for at in range(len(found)))


def group_atoms(graph: Graph, cluster: Cluster) -> Atoms:
    """An atom for each group and each free operator: the pieces of any split."""
    return _atoms(graph, cluster, graph.groups, ordered=False)


def stage_atoms(graph: Graph, cluster: Cluster) -> Atoms:
    """The pieces of a contiguous split: groups, and as one all groups through which data flows in a circle."""
    atom_of = {at: atom for atom, members in enumerate(graph.groups) for at in members}
    arrows = {(atom_of[source], atom_of[target]) for source, target in flow(graph)}
    joined: dict[int, list[int]] = {}
    for atom, circle in enumerate(_circles(len(graph.groups), arrows)):
        joined.setdefault(circle, []).extend(graph.groups[atom])
    return _atoms(graph, cluster, tuple(tuple(sorted(members)) for members in joined.values()), ordered=True)


def join(atoms: Atoms, piece_of: Sequence[int]) -> Atoms:
    """Fewer, larger atoms: those of one piece become one. Pieces count from 0, and must not flow in a circle."""
    count = max(piece_of) + 1
    members: list[list[int]] = [[] for _ in range(count)]
    seconds, held = [0.0] * count, [0] * count
    follows: list[dict[int, None]] = [{} for _ in range(count)]
    for atom, piece in enumerate(piece_of):
        members[piece] += atoms.members[atom]
        seconds[piece] += atoms.seconds[atom]
        held[piece] += atoms.held_bytes[atom]
        follows[piece] |= dict.fromkeys(piece_of[source] for source in atoms.follows[atom] if piece_of[source] != piece)
    sent = (
        (piece_of[o.writer], {piece_of[reader] for reader in o.readers}, o.seconds, o.written_bytes, o.read_bytes) for o in atoms.outputs
    )
    outputs, inside = _outputs(sent, count)
    for atom, piece in enumerate(piece_of):
        inside[piece] += atoms.inside_bytes[atom]
    kept = (tuple(seconds), tuple(held), tuple(inside), atoms.temporary_bytes, atoms.all_bytes)
    return Atoms(tuple(map(tuple, members)), *kept, outputs, tuple(map(tuple, follows)))


def slowest_link(cluster: Cluster) -> Link:
    """A link as slow as the slowest: where links differ, what is reckoned with it can only be too long."""
    links = (cluster.link, *cluster.links.values())
    return Link(min(link.bytes_per_second for link in links), max(link.latency_seconds for link in links))


def _atoms(graph: Graph, cluster: Cluster, members: Sequence[tuple[int, ...]], ordered: bool) -> Atoms:
    atom_of = {at: atom for atom, whole in enumerate(members) for at in whole}
    link, operators, waiting = slowest_link(cluster), graph.operators, _waiting(graph)
    sent = (
        (
            atom_of[at],
            {atom_of[child] for child in graph.children[at]},
            link.seconds(operator),
            0 if at in waiting else operator.output_bytes,
            operator.output_bytes,
        )
        for at, operator in enumerate(operators)
    )
    outputs, inside = _outputs(sent, len(members))
    follows: list[dict[int, None]] = [{} for _ in members]
    for source, target in flow(graph) if ordered else ():
        if atom_of[source] != atom_of[target]:
            follows[atom_of[target]][atom_of[source]] = None
    return Atoms(
        tuple(members),
        tuple(sum(operators[at].seconds for at in whole) for whole in members),
        tuple(sum(_held(operators[at], at in waiting) for at in whole) for whole in members),
        tuple(inside),
        max(operator.temporary_bytes for operator in operators),
        sum(operator.weight_bytes + operator.kept_bytes + operator.output_bytes for operator in operators)
        + max(operator.temporary_bytes for operator in operators),
        outputs,
        tuple(map(tuple, follows)),
    )


def _held(operator: Operator, waits: bool) -> int:
    return operator.weight_bytes + operator.kept_bytes + (operator.output_bytes if waits else 0)


def _waiting(graph: Graph) -> set[int]:
    """The operators of the forward whose output a backward of their group reads: all of them are there when the backward begins.

    None where that is not sure to be the fullest moment: a forward follows a backward, or a backward keeps something.
    """
    operators = graph.operators
    if any(operators[source].backward and not operators[target].backward for source, target in graph.edges):
        return set()
    if any(operator.backward and operator.kept_bytes for operator in operators):
        return set()
    crossing = ((source, target) for source, target in graph.edges if operators[target].backward and not operators[source].backward)
    return {source for source, target in crossing if operators[source].group and operators[source].group == operators[target].group}


def _outputs(sent: Iterable[tuple[int, set[int], float, int, int]], count: int) -> tuple[tuple[Output, ...], list[int]]:
    """Outputs with the same writer and readers as one; and by atom, the bytes of those that never leave it."""
    found: dict[tuple[int, tuple[int, ...]], tuple[float, int, int]] = {}
    inside = [0] * count
    for writer, readers, seconds, written, read in sent:
        others = tuple(sorted(readers - {writer}))
        if others:
            before = found.get((writer, others), (0.0, 0, 0))
            found[writer, others] = (before[0] + seconds, before[1] + written, before[2] + read)
        else:
            inside[writer] += written
    return tuple(Output(*ends, *costs) for ends, costs in found.items()), inside


def _circles(count: int, arrows: Iterable[tuple[int, int]]) -> list[int]:
    """By number, which strongly connected part each lies in: numbers of one part lie on one circle."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    ends = [(source, target) for source, target in arrows if source != target]
    if not ends:
        return list(range(count))
    rows, columns = zip(*ends, strict=True)
    matrix = csr_array(([1] * len(ends), (rows, columns)), shape=(count, count))
    return connected_components(matrix, directed=True, connection="strong")[1].tolist()
