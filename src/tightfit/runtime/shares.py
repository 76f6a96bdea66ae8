"""Shares: what each device does of a placed step: its operators in their order, and what travels between them and those of others.

It follows the simulator's rules (`planner/placement/simulate.py`): what an operator leaves travels once to each other device that reads
it. What is sent here are storages, each as the operator left it that last made or changed it.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tightfit.describe.graph import Captured
from tightfit.describe.tape import Call
from tightfit.terms.placement import Placement

_Ends = dict[tuple[int, int | None], list[int]]
"""By operator and call, the storages that it is the last on its device to use; where no call is named, those that none uses."""


@dataclass(frozen=True)
class Parcel:
    """A storage on its way to another device, as an operator leaves it."""

    storage: int
    operator: int
    source: int
    target: int


@dataclass(frozen=True)
class Turn:
    """One operator's turn on its device: what it waits for, what it runs, and what leaves when it is done."""

    operator: int
    arrivals: tuple[Parcel, ...]
    calls: tuple[tuple[int, tuple[int, ...]], ...]  # number on the tape, and the storages that nobody needs after it
    departures: tuple[Parcel, ...]
    gone: tuple[int, ...]  # storages that nobody needs when those have left


@dataclass(frozen=True)
class Share:
    """What one device does, and the storages that it needs for that from the beginning."""

    device: int
    turns: tuple[Turn, ...]
    weights: frozenset[int]  # and buffers and constants
    inputs: Mapping[int, int]  # by the operator that stands for each


def shares(captured: Captured, placement: Placement, devices: int) -> tuple[Share, ...]:
    """The share of each of so many devices; empty for one to which `placement` gives nothing."""
    arrivals, departures = _travels(captured, placement)
    lines: list[list[int]] = [[] for _ in range(devices)]
    for at in placement.order:
        lines[placement.device_of[at]].append(at)
    inputs, found = inputs_of(captured), []
    for device, line in enumerate(lines):
        ends = _ends(captured, placement, line)
        turns = tuple(_turn(captured, at, arrivals[at], departures[at], ends) for at in line)
        found.append(Share(device, turns, _weights(captured, line), {at: inputs[at] for at in line if at in inputs}))
    return tuple(found)


def _turn(captured: Captured, at: int, arrivals: list[Parcel], departures: list[Parcel], ends: _Ends) -> Turn:
    leaving, numbers = {parcel.storage for parcel in departures}, captured.parts[at]
    calls = tuple((number, tuple(storage for storage in ends[at, number] if storage not in leaving)) for number in numbers)
    gone = tuple(storage for number in (None, *numbers) for storage in ends[at, number] if storage in leaving)
    return Turn(at, tuple(arrivals), calls, tuple(departures), gone)


def inputs_of(captured: Captured) -> dict[int, int]:
    """The storage of each operator that stands for an input of the model, as `graph_of` puts them first."""
    read = {storage for call in captured.tape.calls for storage in call.reads}
    storages = (number for number, storage in enumerate(captured.tape.storages) if storage.kind == "input" and number in read)
    return {at: storage for at, (storage, calls) in enumerate(zip(storages, captured.parts, strict=False)) if not calls}


def _reads(captured: Captured) -> Iterator[tuple[int, int, int]]:
    """(reader, storage, the operator that last made or changed it), in the order of the step."""
    left_by = {storage: at for at, storage in inputs_of(captured).items()}
    part_of = {number: at for at, calls in enumerate(captured.parts) for number in calls}
    for number, call in enumerate(captured.tape.calls):
        yield from ((part_of[number], storage, left_by[storage]) for storage in (*call.reads, *call.writes) if storage in left_by)
        left_by.update(dict.fromkeys((*call.makes, *call.writes), part_of[number]))


def _travels(captured: Captured, placement: Placement) -> tuple[Mapping[int, list[Parcel]], Mapping[int, list[Parcel]]]:
    """By operator, what it waits for first of all on its device, and what leaves when it is done."""
    home, readers = placement.device_of, defaultdict(set)
    for reader, storage, left_by in _reads(captured):
        if home[reader] != home[left_by]:
            readers[Parcel(storage, left_by, home[left_by], home[reader])].add(reader)
    place = {at: number for number, at in enumerate(placement.order)}
    arrivals, departures = defaultdict[int, list[Parcel]](list), defaultdict[int, list[Parcel]](list)
    for parcel, those in readers.items():
        arrivals[min(those, key=place.__getitem__)].append(parcel)
        departures[parcel.operator].append(parcel)
    return arrivals, departures


def _ends(captured: Captured, placement: Placement, line: Sequence[int]) -> _Ends:
    """What the step gives stays where it was made."""
    tape, home, inputs = captured.tape, placement.device_of, inputs_of(captured)
    made_by = {storage: at for at, storage in inputs.items()}
    made_by |= {storage: at for at, calls in enumerate(captured.parts) for number in calls for storage in tape.calls[number].makes}
    gives = {window.storage for window in (*tape.results, *tape.gradients.values())}
    runs = [(at, number) for at in line for number in captured.parts[at]]
    last = {storage: run for run in runs for storage in _used(tape.calls[run[1]])}
    ends: _Ends = defaultdict(list, {(at, None): [inputs[at]] for at in line if at in inputs and inputs[at] not in last})
    for storage, run in last.items():
        if storage in made_by and not (storage in gives and home[made_by[storage]] == home[run[0]]):
            ends[run].append(storage)
    return ends


def _used(call: Call) -> tuple[int, ...]:
    return (*call.reads, *call.writes, *call.makes)


def _weights(captured: Captured, line: Sequence[int]) -> frozenset[int]:
    used = {storage for at in line for number in captured.parts[at] for storage in _used(captured.tape.calls[number])}
    return frozenset(at for at in used if captured.tape.storages[at].kind in ("parameter", "buffer", "constant"))
