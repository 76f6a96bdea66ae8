"""Splitting: the best stages along given ideals, by dynamic programming.

A stage is what one ideal holds beyond another; the least largest load of every ideal, with every number of devices of each kind before it,
follows from those of the ideals within (Tarnawski et al., NeurIPS 2020, section 4). Ideals that no split better than the best known can
be cut at are left out: what lies before must fit on the devices before, in seconds and in bytes, and what lies behind on the others.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from tightfit.planner.placement.atoms import Atoms
from tightfit.planner.placement.family import Family, Flags, Whole, family
from tightfit.terms.cluster import Cluster

_MOST_STATES = 300
_MOST_PAIRS = 4_000_000  # of ideals, compared at once: 32 MB for each table
_KEPT_PAIRS = 16_000_000  # kept for all states


@dataclass(frozen=True)
class Kind:
    """Devices that are alike."""

    devices: tuple[int, ...]
    memory_bytes: int
    speed: float


@dataclass(frozen=True)
class Stage:
    """One stage of a split: what `after` holds beyond `before`."""

    kind: int
    before: int
    after: int


@dataclass(frozen=True)
class Split:
    """Stages in the order of the forward, and their largest load as reckoned with the slowest link."""

    stages: tuple[Stage, ...]
    seconds: float


State = tuple[int, ...]
"""How many devices of each kind are in use."""


class OutOfTime(Exception):
    """The search was not over when its time was."""


def kinds_of(cluster: Cluster) -> tuple[Kind, ...]:
    """The devices by kind, in the order in which the first of each stands."""
    found: dict[tuple[int, float], list[int]] = {}
    for number, device in enumerate(cluster.devices):
        found.setdefault((device.memory_bytes, device.speed), []).append(number)
    return tuple(Kind(tuple(devices), memory, speed) for (memory, speed), devices in found.items())


def best_split(
    atoms: Atoms,
    ideals: Sequence[int],
    kinds: Sequence[Kind],
    below: float,
    deadline: float,
    crowded: float = 0.0,
    refused: frozenset[Stage] = frozenset(),
) -> Split | None:
    """The split along `ideals` with the least largest load; None where none is better than `below` seconds.

    The first and the last ideal must be the empty and the full one. Memory counts what a stage is sure to hold at once, and the share
    `crowded` of what else it may hold: all outputs that it touches, and the largest temporary memory. Stages in `refused` are not used.
    Raises `OutOfTime` where `time.perf_counter()` passes `deadline`.
    """
    table = family(atoms, ideals)
    states = _states(kinds)
    near = np.zeros(len(ideals), dtype=bool)
    for state in states:
        near |= _window(table, kinds, state, below)
    if not (near[0] and near[-1]):
        return None
    kept = [ideal for ideal, wanted in zip(ideals, near.tolist(), strict=True) if wanted]
    return _Search(table.only(near), kept, kinds, states, below, deadline, crowded, refused).split()


@dataclass
class _Search:
    """The dynamic program's table, and what it needs to fill it."""

    table: Family
    ideals: list[int]
    kinds: Sequence[Kind]
    states: list[State]
    below: float
    deadline: float
    crowded: float
    refused: frozenset[Stage]

    def split(self) -> Split | None:
        """Fill the table, state by state, then follow the best way back from the full ideal."""
        count, known = len(self.ideals), set(self.states)
        best = {state: np.full(count, np.inf) for state in self.states}
        way: dict[State, tuple[Whole, Whole]] = {state: (np.zeros(count, np.int64), np.zeros(count, np.int64)) for state in self.states}
        best[self.states[0]][0] = 0.0
        windows = {state: np.flatnonzero(_window(self.table, self.kinds, state, self.below)) for state in self.states}
        steps = [(state, kind, target) for state in self.states for kind, target in self._next(state) if target in known]
        self.table.at_once = count**2 <= min(_KEPT_PAIRS, sum(len(windows[state]) * len(windows[target]) for state, _, target in steps))
        for state, kind, target in steps:
            columns = windows[target]
            for rows in _parts(np.flatnonzero(best[state] < self.below), len(columns)):
                loads = np.maximum(self._loads(rows, columns, kind), best[state][rows, None])
                at = loads.argmin(0)
                least = loads[at, np.arange(len(columns))]
                better = least < best[target][columns]
                best[target][columns[better]] = least[better]
                way[target][0][columns[better]], way[target][1][columns[better]] = rows[at[better]], kind
        last = min(self.states, key=lambda state: best[state][-1])
        return Split(self._back(last, way), float(best[last][-1])) if best[last][-1] < self.below else None

    def _next(self, state: State) -> Iterator[tuple[int, State]]:
        """Each kind, and the state with one more of it in use."""
        for kind in range(len(state)):
            yield kind, (*state[:kind], state[kind] + 1, *state[kind + 1 :])

    def _back(self, state: State, way: dict[State, tuple[Whole, Whole]]) -> tuple[Stage, ...]:
        stages, at = [], len(self.ideals) - 1
        while sum(state):
            before, kind = int(way[state][0][at]), int(way[state][1][at])
            if before != at:
                stages.append(Stage(kind, self.ideals[before], self.ideals[at]))
            state, at = (*state[:kind], state[kind] - 1, *state[kind + 1 :]), before
        return tuple(reversed(stages))

    def _loads(self, rows: Whole, columns: Whole, kind: int) -> np.ndarray:
        """Seconds of the stages of what `columns` hold beyond `rows`; infinite where there is none, or it does not fit."""
        if time.perf_counter() > self.deadline:
            raise OutOfTime
        table, device = self.table, self.kinds[kind]
        loads, passing = table.between(rows, columns)
        loads = loads + (table.seconds[columns] - table.seconds[rows, None]) / device.speed
        held = table.held_bytes[columns] - table.held_bytes[rows, None]
        if self.crowded:
            more = table.inside_bytes[columns] - table.inside_bytes[rows, None] + passing + table.atoms.temporary_bytes
            held = held + self.crowded * np.where(columns == rows[:, None], 0.0, more)
        loads[held > device.memory_bytes] = np.inf
        if self.refused:
            row_of, column_of = ({self.ideals[at]: number for number, at in enumerate(some)} for some in (rows, columns))
            for stage in self.refused:
                if stage.kind == kind and stage.before in row_of and stage.after in column_of:
                    loads[row_of[stage.before], column_of[stage.after]] = np.inf
        return loads


def _states(kinds: Sequence[Kind]) -> list[State]:
    """All states where they are few, so that every order of the devices is tried; else those along some orders. Fewer devices first."""
    counts = [len(kind.devices) for kind in kinds]
    if np.prod([count + 1.0 for count in counts]) <= _MOST_STATES:
        return sorted(product(*(range(count + 1) for count in counts)), key=lambda state: (sum(state), state))
    found = set()
    ranks: list[Callable[[int], tuple[float, float]]] = [
        lambda kind: (kinds[kind].speed, kinds[kind].memory_bytes),
        lambda kind: (-kinds[kind].speed, -kinds[kind].memory_bytes),
        lambda kind: (kinds[kind].memory_bytes, kinds[kind].speed),
        lambda kind: (-kinds[kind].memory_bytes, -kinds[kind].speed),
        lambda kind: (kind, 0),
    ]
    for rank in ranks:
        state = [0] * len(kinds)
        found.add(tuple(state))
        for kind in sorted(range(len(kinds)), key=rank):
            for _ in range(counts[kind]):
                state[kind] += 1
                found.add(tuple(state))
    return sorted(found, key=lambda state: (sum(state), state))


def _window(table: Family, kinds: Sequence[Kind], state: State, below: float) -> Flags:
    """The ideals that a split below `below` seconds can be cut at with the devices of `state` before it and the others behind."""
    rest = tuple(len(kind.devices) - used for kind, used in zip(kinds, state, strict=True))
    return _holds(table, kinds, state, below, table.seconds, table.held_bytes) & _holds(
        table, kinds, rest, below, table.seconds[-1] - table.seconds, table.held_bytes[-1] - table.held_bytes
    )


def _holds(table: Family, kinds: Sequence[Kind], state: State, below: float, seconds: np.ndarray, held: np.ndarray) -> Flags:
    """Whether the devices of `state` can take that much work and memory, and send what crosses; none can take nothing."""
    used = [(kind, count) for kind, count in zip(kinds, state, strict=True) if count]
    if not used:
        return (held <= 0) & (seconds <= 0) & (table.inside.sum(1) % table.inside.shape[1] == 0)
    power = sum(kind.speed * count for kind, count in used)
    memory = sum(kind.memory_bytes * count for kind, count in used)
    slowest = min(kind.speed for kind, _ in used)
    return (seconds + table.crossing * slowest <= below * power * (1 + 1e-9)) & (held <= memory)


def _parts(rows: Whole, columns: int) -> Iterator[Whole]:
    """`rows` in parts of so many that their pairs with the columns are not too many."""
    step = max(1, _MOST_PAIRS // max(1, columns))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]
