"""Rebalance: local search on the largest load of a split that need not be contiguous: move an atom, or swap two.

The measure is the sum of loads to a high power, so that a step that lowers the second largest load counts too.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tightfit.planner.placement.atoms import Atoms, group_atoms
from tightfit.planner.placement.load import held_bytes, load
from tightfit.planner.placement.memory import inside
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph

_POWER = 12
_MOST_SWAPS = 60  # partners tried for an atom, those of the nearest work first


def rebalance(graph: Graph, cluster: Cluster, device_of: Sequence[int], seconds_limit: float = 5.0, seed: int = 0) -> tuple[int, ...]:
    """A split with at most the largest load of `device_of`, which must fit, and that fits.

    Moves and swaps groups until nothing helps, then from shaken copies of the best; at most `seconds_limit` seconds and so many shakes
    without gain. Deterministic for a seed where time does not end it.
    """
    atoms = group_atoms(graph, cluster)
    deadline, shuffled = time.perf_counter() + seconds_limit, random.Random(seed)
    best, least = tuple(device_of), max(load(graph, cluster, device_of))
    start, quiet = [device_of[members[0]] for members in atoms.members], 0
    while quiet < 20 and time.perf_counter() < deadline:
        split = Loads(atoms, cluster, list(start))
        if quiet:
            _shake(split, shuffled)
        _descend(split, deadline)
        found = atoms.spread(split.device_of)
        seconds = max(load(graph, cluster, found))
        if inside(cluster, held_bytes(graph, cluster, found)) and seconds < least * (1 - 1e-9):
            best, least, start, quiet = found, seconds, split.device_of, 0
        else:
            quiet += 1
    return best


def pack(graph: Graph, cluster: Cluster) -> tuple[int, ...] | None:
    """A split that fits, made for memory alone: the largest group first, where the most is free; None where that fails."""
    atoms = group_atoms(graph, cluster)
    for key in (lambda free, device: (-free, device), lambda free, device: (free, device)):
        free, device_of = [device.memory_bytes for device in cluster.devices], [-1] * len(atoms.members)
        for atom in sorted(range(len(device_of)), key=lambda atom: (-atoms.held_bytes[atom], -atoms.seconds[atom], atom)):
            rooms = [device for device in range(len(free)) if free[device] >= atoms.held_bytes[atom]]
            if not rooms:
                break
            device_of[atom] = min(rooms, key=lambda device: key(free[device], device))
            free[device_of[atom]] -= atoms.held_bytes[atom]
        found = atoms.spread(device_of)
        if -1 not in device_of and inside(cluster, held_bytes(graph, cluster, found)):
            return found
    return None


def repair(graph: Graph, cluster: Cluster, device_of: Sequence[int], seconds_limit: float = 2.0) -> tuple[int, ...] | None:
    """A split near `device_of` that fits: atoms leave overfull devices, those first that raise loads the least for their bytes.

    None where that comes to no end, within `seconds_limit` seconds.
    """
    atoms, deadline = group_atoms(graph, cluster), time.perf_counter() + seconds_limit
    split = Loads(atoms, cluster, [device_of[members[0]] for members in atoms.members])
    while time.perf_counter() < deadline:
        if all(split.room(device) >= 0 for device in range(len(split.held))):
            found = atoms.spread(split.device_of)
            return found if inside(cluster, held_bytes(graph, cluster, found)) else None
        step = min(_relieving(split), default=None)
        if step is None:
            return None
        split.take(step[1])
    return None


@dataclass
class Loads:
    """The loads of a split, kept up as atoms move; links count as the slowest."""

    atoms: Atoms
    cluster: Cluster
    device_of: list[int]
    seconds: list[float] = field(init=False)
    held: list[int] = field(init=False)
    readers: list[list[int]] = field(init=False)  # by output and device, how many atoms there read it
    touched: list[list[int]] = field(init=False)  # by atom, the outputs that it writes or reads

    def __post_init__(self) -> None:
        devices = range(len(self.cluster.devices))
        self.seconds, self.held = [0.0 for _ in devices], [0 for _ in devices]
        self.readers = [[0 for _ in devices] for _ in self.atoms.outputs]
        self.touched = [[] for _ in self.atoms.members]
        for atom, device in enumerate(self.device_of):
            self.seconds[device] += self.atoms.seconds[atom] / self.cluster.devices[device].speed
            self.held[device] += self.atoms.held_bytes[atom]
        for number, output in enumerate(self.atoms.outputs):
            for atom in (output.writer, *output.readers):
                self.touched[atom].append(number)
            for atom in output.readers:
                self.readers[number][self.device_of[atom]] += 1
            self._charge(number, 1.0)

    def measure(self) -> float:
        """What a step should lower."""
        most = max(self.seconds) or 1.0
        return most * sum((seconds / most) ** _POWER for seconds in self.seconds) ** (1 / _POWER)

    def move(self, atom: int, device: int) -> None:
        """Put `atom` on `device`."""
        home, work = self.device_of[atom], self.atoms.seconds[atom]
        for number in self.touched[atom]:
            self._charge(number, -1.0)
            if self.atoms.outputs[number].writer != atom:
                self.readers[number][home] -= 1
                self.readers[number][device] += 1
        self.device_of[atom] = device
        for number in self.touched[atom]:
            self._charge(number, 1.0)
        self.seconds[home] -= work / self.cluster.devices[home].speed
        self.seconds[device] += work / self.cluster.devices[device].speed
        self.held[home] -= self.atoms.held_bytes[atom]
        self.held[device] += self.atoms.held_bytes[atom]

    def take(self, moves: Sequence[tuple[int, int]]) -> None:
        """Put atoms on devices."""
        for atom, device in moves:
            self.move(atom, device)

    def room(self, device: int) -> int:
        """Bytes that are left there."""
        return self.cluster.devices[device].memory_bytes - self.held[device]

    def _charge(self, number: int, sign: float) -> None:
        output = self.atoms.outputs[number]
        home, seconds, sent = self.device_of[output.writer], sign * output.seconds, False
        for device, count in enumerate(self.readers[number]):
            if count and device != home:
                self.seconds[device] += seconds
                sent = True
        if sent:
            self.seconds[home] += seconds


def _descend(split: Loads, deadline: float) -> None:
    """Moves and swaps from the fullest devices, as long as one helps."""
    better = True
    while better and time.perf_counter() < deadline:
        better = False
        for device in sorted(range(len(split.seconds)), key=lambda device: -split.seconds[device]):
            inside = [atom for atom, home in enumerate(split.device_of) if home == device]
            heaviest = sorted(inside, key=lambda atom: -split.atoms.seconds[atom])
            if any(time.perf_counter() < deadline and _step(split, atom, deadline) for atom in heaviest):
                better = True
                break


def _step(split: Loads, atom: int, deadline: float) -> bool:
    """The best move of `atom`, else the first swap that helps; whether there was one."""
    home, before, size = split.device_of[atom], split.measure(), split.atoms.held_bytes[atom]
    found: list[tuple[float, int]] = []
    for device in range(len(split.seconds)):
        if device != home and split.room(device) >= size:
            found.append((_tried(split, lambda device=device: split.move(atom, device), lambda: split.move(atom, home)), device))
    if found and min(found)[0] < before * (1 - 1e-9):
        split.move(atom, min(found)[1])
        return True
    for other in _partners(split, atom):
        there, gain = split.device_of[other], split.atoms.held_bytes[other] - size
        if split.room(home) < gain or split.room(there) < -gain or time.perf_counter() > deadline:
            continue
        split.move(atom, there)
        split.move(other, home)
        if split.measure() < before * (1 - 1e-9):
            return True
        split.move(other, there)
        split.move(atom, home)
    return False


def _tried(split: Loads, there: Callable[[], None], back: Callable[[], None]) -> float:
    """The measure after a step that is taken back."""
    there()
    found = split.measure()
    back()
    return found


def _relieving(split: Loads) -> Iterator[tuple[float, list[tuple[int, int]]]]:
    """Moves out of overfull devices, or else swaps with less, and what each costs: the measure it adds, per byte."""
    sizes, before = split.atoms.held_bytes, split.measure()
    full = [atom for atom, device in enumerate(split.device_of) if split.room(device) < 0 and sizes[atom]]
    moves = [(atom, None, device) for atom in full for device in range(len(split.held)) if split.room(device) >= sizes[atom]]
    if not moves:
        smaller = [(atom, other) for atom in full for other, size in enumerate(sizes) if size < sizes[atom]]
        pairs = ((atom, other, split.device_of[other]) for atom, other in smaller if split.device_of[other] != split.device_of[atom])
        moves = [(atom, other, there) for atom, other, there in pairs if split.room(there) >= sizes[atom] - sizes[other]]
    for atom, other, there in moves:
        home = split.device_of[atom]
        relief = min(sizes[atom] - (sizes[other] if other is not None else 0), -split.room(home))
        step = [(atom, there)] if other is None else [(atom, there), (other, home)]
        back = [(atom, home)] if other is None else [(other, there), (atom, home)]
        after = _tried(split, lambda step=step: split.take(step), lambda back=back: split.take(back))
        yield (after - before) / relief, step


def _partners(split: Loads, atom: int) -> list[int]:
    """Atoms on other devices to swap with: those of the nearest smaller work first."""
    home, work = split.device_of[atom], split.atoms.seconds[atom]
    others = [other for other, device in enumerate(split.device_of) if device != home and split.atoms.seconds[other] < work]
    return sorted(others, key=lambda other: (-split.atoms.seconds[other], other))[:_MOST_SWAPS]


def _shake(split: Loads, shuffled: random.Random) -> None:
    """Some atoms to devices where they fit."""
    for _ in range(2 + len(split.device_of) // 40):
        atom, device = shuffled.randrange(len(split.device_of)), shuffled.randrange(len(split.seconds))
        if split.room(device) >= split.atoms.held_bytes[atom]:
            split.move(atom, device)
