"""Ideals: the sets of atoms that hold all that their members follow, which are the places where a pipeline can be cut.

A set is an integer with a bit for each atom. All of them (Tarnawski et al., NeurIPS 2020, section 4) where they are few, else those along
good linear orders.
"""

import heapq
import random
from collections.abc import Callable, Iterable, Sequence

from tightfit.planner.placement.atoms import Atoms


def all_ideals(atoms: Atoms, most: int) -> list[int] | None:
    """Every ideal, smaller ones first; None where there are more than `most`."""
    needs = [sum(1 << source for source in sources) for sources in atoms.follows]
    level = {0: sum(1 << atom for atom, need in enumerate(needs) if not need)}  # by ideal, the atoms that can join it
    found: list[int] = []
    while level:
        found += level
        if len(found) > most:
            return None
        grown: dict[int, int] = {}
        for ideal, ready in level.items():
            left = ready
            while left:
                bit = left & -left
                left ^= bit
                larger = ideal | bit
                if larger not in grown:
                    opened = sum(1 << atom for atom in atoms.followers[bit.bit_length() - 1] if not needs[atom] & ~larger)
                    grown[larger] = ready ^ bit | opened
            if len(grown) + len(found) > most:
                return None
        level = grown
    return found


def linear_orders(atoms: Atoms, shuffles: int = 4, seed: int = 0) -> list[tuple[int, ...]]:
    """Orders in which each atom stands behind what it follows: with little on the way, breadth first, depth first, by level, shuffled."""
    down, up = _levels(atoms.follows, atoms.followers), _levels(atoms.followers, atoms.follows)
    count = len(atoms.members)
    orders = [_narrow(atoms), _ordered(atoms.follows, atoms.followers, lambda atom, turn: (turn,))]
    orders.append(_ordered(atoms.follows, atoms.followers, lambda atom, turn: (-turn,)))
    orders.append(_ordered(atoms.followers, atoms.follows, lambda atom, turn: (-turn,))[::-1])
    orders.append(tuple(sorted(range(count), key=lambda atom: (down[atom], atom))))
    orders.append(tuple(sorted(range(count), key=lambda atom: (-up[atom], atom))))
    for number in range(shuffles):
        rank = list(range(count))
        random.Random(seed + number).shuffle(rank)
        orders.append(_ordered(atoms.follows, atoms.followers, lambda atom, turn, rank=rank: (-turn // 8, rank[atom])))
    return list(dict.fromkeys(orders))


def prefixes(order: Sequence[int]) -> list[int]:
    """The ideals along one linear order."""
    found = [0]
    for atom in order:
        found.append(found[-1] | 1 << atom)
    return found


def closures(atoms: Atoms) -> tuple[list[int], list[int]]:
    """For each atom, itself with all that it follows, and itself with all that follow it."""
    return _closed(atoms.follows, atoms.followers), _closed(atoms.followers, atoms.follows)


def nearby(ideal: int, behind: Sequence[int], ahead: Sequence[int], atoms: Iterable[int]) -> list[int]:
    """Ideals that one atom more makes, with what it follows, or one less, with what follows it."""
    return [ideal & ~ahead[atom] if ideal >> atom & 1 else ideal | behind[atom] for atom in atoms]


def along(ideal: int, behind: Sequence[int], ahead: Sequence[int], order: Sequence[int]) -> list[int]:
    """Ideals that 1, 2, 4, 8, … atoms more make, the next along an order with what they follow, or so many less, the last along it."""
    found = []
    outside = [atom for atom in order if not ideal >> atom & 1]
    inside = [atom for atom in reversed(order) if ideal >> atom & 1]
    more, less = ideal, ideal
    for number in range(1, len(order) + 1):
        more |= behind[outside[number - 1]] if number <= len(outside) else 0
        less &= ~ahead[inside[number - 1]] if number <= len(inside) else -1
        if number & (number - 1) == 0:
            found += [more, less]
    return found


def _closed(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> list[int]:
    found = [0] * len(before)
    for atom in _ordered(before, after, lambda atom, turn: (turn,)):
        found[atom] = 1 << atom
        for source in before[atom]:
            found[atom] |= found[source]
    return found


def _levels(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> list[int]:
    """The longest way to each atom, in edges."""
    found = [0] * len(before)
    for atom in _ordered(before, after, lambda atom, turn: (turn,)):
        found[atom] = max((found[source] + 1 for source in before[atom]), default=0)
    return found


def _ordered(
    before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], rank: Callable[[int, int], tuple[int, ...]]
) -> tuple[int, ...]:
    """A linear order that takes the ready atom of least rank; a rank may look at the turn in which the atom became ready."""
    waits = [len(sources) for sources in before]
    ready = [(rank(atom, -1), atom) for atom, count in enumerate(waits) if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        _, atom = heapq.heappop(ready)
        order.append(atom)
        for target in after[atom]:
            waits[target] -= 1
            if not waits[target]:
                heapq.heappush(ready, (rank(target, len(order)), target))
    return tuple(order)


def _narrow(atoms: Atoms) -> tuple[int, ...]:
    """A linear order that at each turn takes the ready atom after which the least has to be sent."""
    touched: list[list[int]] = [[] for _ in atoms.members]
    for number, output in enumerate(atoms.outputs):
        for atom in (output.writer, *output.readers):
            touched[atom].append(number)
    ends = [1 + len(output.readers) for output in atoms.outputs]
    taken = [0] * len(ends)

    def growth(atom: int) -> float:
        """What is sent across the cut after `atom`, less what was before."""
        opened = sum(atoms.outputs[number].seconds for number in touched[atom] if not taken[number])
        return opened - sum(atoms.outputs[number].seconds for number in touched[atom] if taken[number] == ends[number] - 1)

    waits = [len(sources) for sources in atoms.follows]
    ready = {atom: None for atom, count in enumerate(waits) if not count}
    order = []
    while ready:
        atom = min(reversed(list(ready)[-64:]), key=growth)
        del ready[atom]
        order.append(atom)
        for number in touched[atom]:
            taken[number] += 1
        for target in atoms.followers[atom]:
            waits[target] -= 1
            if not waits[target]:
                ready[target] = None
    return tuple(order)
