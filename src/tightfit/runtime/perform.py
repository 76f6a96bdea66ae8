"""Perform: run one device's share of a placed step in this process; the other devices are processes of the same group.

Each operator runs as `rehearse/replay.py` runs it, when all that it waits for is there. What it leaves for others is sent when it is
done, and the next operator does not wait for that. Receives are posted before the step, so that a transfer starts when its tensor is
ready, as the simulator says.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from tightfit.describe.tape import Tape
from tightfit.rehearse.replay import Held, laid_out, run_call, seen
from tightfit.runtime.shares import Parcel, Share, Turn

Arriving = dict[Parcel, tuple[dist.Work, Tensor]]


@dataclass
class Performed:
    """What one device did. Moments are those of `time.perf_counter`, which the processes of a host share."""

    start: dict[int, float] = field(default_factory=dict)  # by operator
    end: dict[int, float] = field(default_factory=dict)
    sent: dict[Parcel, tuple[float, float]] = field(default_factory=dict)  # from when to when, if watched
    changes: list[tuple[float, int]] = field(default_factory=list)  # bytes more or fewer that are held beside weights, if watched
    received: dict[Parcel, int] = field(default_factory=dict)  # bytes, held from the moment when the parcel was sent, if watched
    results: dict[int, Tensor] = field(default_factory=dict)  # by place among the step's results: those that were made here
    gradients: dict[str, Tensor] = field(default_factory=dict)


def tags_of(shares: Iterable[Share]) -> dict[Parcel, int]:
    """A number for each parcel, the same in all processes."""
    arrivals = (parcel for share in shares for turn in share.turns for parcel in turn.arrivals)
    return {parcel: tag for tag, parcel in enumerate(arrivals)}


def post(share: Share, tape: Tape, tags: Mapping[Parcel, int]) -> Arriving:
    """Be ready to receive all that the share reads of other devices, which are the ranks of the group."""
    arriving: Arriving = {}
    for parcel in (parcel for turn in share.turns for parcel in turn.arrivals):
        buffer = torch.empty(tape.storages[parcel.storage].size_bytes, dtype=torch.uint8)
        work = dist.irecv(buffer, parcel.source, tag=tags[parcel])
        assert work is not None, "this process is one of the group"
        arriving[parcel] = work, buffer
    return arriving


def perform(
    share: Share, tape: Tape, tensors: Mapping[int, Tensor], arriving: Arriving, tags: Mapping[Parcel, int], watched: bool = False
) -> Performed:
    """Run the share once. `tensors`: those of its weights and inputs at least, as `bound` finds them; `arriving`: what `post` gave.

    Each call draws random numbers from a seed of its own, its number on the tape, so that they do not depend on the placement.
    `watched`: note what is held and sent when. Each send is then waited for, since nothing but a wait tells when it is over.
    """
    device = _Device(tape, tensors, arriving, tags, watched)
    device.held = {storage: (tensors[storage], None) for storage in share.weights}
    with torch.set_grad_enabled(bool(tape.gradients)):
        for turn in share.turns:
            device.run(turn, share.inputs.get(turn.operator))
        done = device.done
        done.results |= {place: seen(device.held, at) for place, at in enumerate(tape.results) if at.storage in device.held}
        done.gradients |= {name: seen(device.held, at) for name, at in tape.gradients.items() if at.storage in device.held}
    device.wait_for(list(device.leaving))
    return done


def peak_bytes(performed: Sequence[Performed]) -> list[int]:
    """The most that each device held beside its weights; of shares that were watched, by device."""
    sent = {parcel: when for one in performed for parcel, when in one.sent.items()}
    peaks = []
    for one in performed:
        changes = [*one.changes, *((sent[parcel][0], size) for parcel, size in one.received.items())]
        peaks.append(max(accumulate((size for _, size in sorted(changes)), initial=0)))
    return peaks


class _Device:
    """What one device holds and has underway while it works."""

    def __init__(self, tape: Tape, tensors: Mapping[int, Tensor], arriving: Arriving, tags: Mapping[Parcel, int], watched: bool) -> None:
        self.tape, self.tensors, self.arriving, self.tags, self.watched = tape, tensors, arriving, tags, watched
        self.held: Held = {}
        self.leaving: dict[int, list[dist.Work]] = defaultdict(list)
        self.done = Performed()

    def run(self, turn: Turn, given: int | None) -> None:
        """One operator; or, if it stands for an input, the storage `given`."""
        for parcel in turn.arrivals:
            self._receive(parcel)
        now = self.done.start[turn.operator] = time.perf_counter()
        if given is not None:
            self.held[given] = self.tensors[given], None
            self._note(now, [given])
        for number, ends in turn.calls:
            self._call(number, now)
            now = self._give_up(ends)
        self.done.end[turn.operator] = now
        for parcel in turn.departures:
            self._send(parcel)
        if turn.departures:
            self._give_up(turn.gone, self.done.sent[turn.departures[-1]][1])

    def wait_for(self, storages: Iterable[int]) -> None:
        """Until nothing of them is underway any more."""
        for storage in storages:
            for work in self.leaving.pop(storage, ()):
                work.wait()

    def _call(self, number: int, begin: float) -> None:
        call = self.tape.calls[number]
        self.wait_for(call.writes)
        if torch.Tag.nondeterministic_seeded in call.function.tags:
            torch.default_generator.manual_seed(number)
        run_call(call, self.held)
        self._note(begin, call.makes)

    def _receive(self, parcel: Parcel) -> None:
        """An older state of the storage is not needed any more: its readers stand before those of this one."""
        work, buffer = self.arriving.pop(parcel)
        work.wait()
        self._give_up([parcel.storage])
        self.held[parcel.storage] = buffer, None
        self.done.received[parcel] = buffer.nbytes

    def _send(self, parcel: Parcel) -> None:
        begin = time.perf_counter()
        work = dist.isend(self._bytes_of(parcel.storage), parcel.target, tag=self.tags[parcel])
        assert work is not None, "this process is one of the group"
        self.leaving[parcel.storage].append(work)
        if self.watched:
            self.wait_for([parcel.storage])
        self.done.sent[parcel] = begin, time.perf_counter()

    def _bytes_of(self, storage: int) -> Tensor:
        """All of a storage, laid out as recorded, for that is what its readers expect."""
        return torch.empty(0, dtype=torch.uint8).set_(laid_out(self.held, storage).untyped_storage())

    def _note(self, when: float, made: Iterable[int]) -> None:
        if self.watched:
            self.done.changes += [(when, size) for size in self._sizes(made)]

    def _give_up(self, storages: Iterable[int], when: float | None = None) -> float:
        """To give memory back takes time, which belongs to the operator that was the last to need it; gives the moment when it is over."""
        sizes = self._sizes(storages) if self.watched else []
        for storage in storages:
            self.held.pop(storage, None)
        when = time.perf_counter() if when is None else when
        self.done.changes += [(when, -size) for size in sizes]
        return when

    def _sizes(self, storages: Iterable[int]) -> list[int]:
        """A kernel may leave out what its fake makes, if nobody asks for it."""
        return [self.held[storage][0].untyped_storage().nbytes() for storage in storages if storage in self.held]
