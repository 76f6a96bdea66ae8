"""Folding: atoms become fewer: those without work go with a neighbour, which costs nothing; runs of a linear order go together, which may.

An atom that takes no time, and all of whose followers are one atom, or that follows but one, can move to that neighbour's stage without
breaking the order. No load grows if what these two alone send each other takes as long as all that the atom shares with others and not
with the neighbour: the stage it leaves and the one it joins save the first, and spend at most the second. What the atom, the neighbour and
others share costs no stage more than before.
"""

from collections.abc import Sequence

from tightfit.planner.placement.atoms import Atoms, Output, join


def fold(atoms: Atoms, ample: bool) -> Atoms:
    """The same graph in fewer atoms, with the same least largest load over contiguous splits.

    `ample`: memory is never short. If it may be, only atoms fold that hold nothing, and only in graphs whose outputs take no memory.
    """
    if not ample and any(output.written_bytes + output.read_bytes for output in atoms.outputs):
        return atoms
    while True:
        piece_of = _pairs(atoms, ample)
        if max(piece_of) + 1 == len(piece_of):
            return atoms
        atoms = join(atoms, piece_of)


def coarse(atoms: Atoms, order: Sequence[int], most: int) -> Atoms:
    """About `most` atoms at most, each a run along the order, cut where the least has to be sent; equal shares of work and bytes."""
    work, held = sum(atoms.seconds) or 1.0, sum(atoms.held_bytes) or 1
    share = [atoms.seconds[atom] / work + atoms.held_bytes[atom] / held + 1 / len(order) for atom in order]
    costs = _crossings(atoms, order)
    piece_of, piece, passed, cheapest = [0] * len(order), 0, 0.0, (float("inf"), 0)
    cuts, limit = set(), sum(share) / most
    for place, part in enumerate(share):
        passed += part
        cheapest = min(cheapest, (costs[place], place))
        if passed >= limit:
            cuts.add(cheapest[1])
            passed, cheapest = passed % limit, (float("inf"), 0)
    for place, atom in enumerate(order):
        piece_of[atom] = piece
        piece += place in cuts and place < len(order) - 1
    return join(atoms, piece_of)


def _crossings(atoms: Atoms, order: Sequence[int]) -> list[float]:
    """Seconds to send once all that crosses the cut behind each place of the order."""
    place = {atom: number for number, atom in enumerate(order)}
    change = [0.0] * (len(order) + 1)
    for output in atoms.outputs:
        ends = [place[atom] for atom in (output.writer, *output.readers)]
        change[min(ends)] += output.seconds
        change[max(ends)] -= output.seconds
    found, crossing = [], 0.0
    for number in range(len(order)):
        crossing += change[number]
        found.append(crossing)
    return found


def _pairs(atoms: Atoms, ample: bool) -> list[int]:
    """The piece of each atom: one that folds is in the piece of its neighbour; no piece takes two at a time."""
    touched: list[list[Output]] = [[] for _ in atoms.members]
    for output in atoms.outputs:
        for atom in (output.writer, *output.readers):
            touched[atom].append(output)
    into = list(range(len(atoms.members)))
    taken = [False for _ in atoms.members]
    for atom, seconds in enumerate(atoms.seconds):
        if seconds or taken[atom] or not (ample or atoms.held_bytes[atom] + atoms.inside_bytes[atom] == 0):
            continue
        for near in (atoms.followers[atom], atoms.follows[atom]):
            if len(near) == 1 and not taken[near[0]] and _no_loss(touched[atom], near[0]):
                into[atom] = near[0]
                taken[atom] = taken[near[0]] = True
                break
    numbers = {atom: number for number, atom in enumerate(dict.fromkeys(into))}
    return [numbers[atom] for atom in into]


def _no_loss(touched: Sequence[Output], near: int) -> bool:
    """Whether what an atom and `near` alone send each other takes as long as all that the atom shares, and not with `near`."""
    ends = [({output.writer, *output.readers}, output.seconds) for output in touched]
    saved = sum(seconds for atoms, seconds in ends if near in atoms and len(atoms) == 2)
    return sum(seconds for atoms, seconds in ends if near not in atoms) <= saved
