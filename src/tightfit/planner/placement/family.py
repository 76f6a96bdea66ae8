"""Family: many ideals side by side, and what a stage takes that lies between any two of them.

The time to send an output is a matter of which of its writer and readers each of the two ideals holds. Few such states occur, so the times
of all pairs are one product of matrices: what each state of the smaller ideal costs beside each of the larger, times which state that has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tightfit.planner.placement.atoms import Atoms, Output

Floats = NDArray[np.float64]
Whole = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass
class Family:
    """Ideals as the rows of a table."""

    atoms: Atoms
    inside: Flags  # (ideals, atoms)
    at_once: bool = False  # whether `between` keeps all pairs, which is worth it where most are asked for, and more than once

    @cached_property
    def seconds(self) -> Floats:
        """The work in each ideal, on a device of speed 1."""
        return self.inside @ np.array(self.atoms.seconds, dtype=np.float64)

    @cached_property
    def held_bytes(self) -> Floats:
        """Weights and what is kept, of each ideal; exact below 2^53."""
        return self.inside @ np.array(self.atoms.held_bytes, dtype=np.float64)

    @cached_property
    def inside_bytes(self) -> Floats:
        """Outputs of each ideal that no other atom reads, beyond `held_bytes`."""
        return self.inside @ np.array(self.atoms.inside_bytes, dtype=np.float64)

    @cached_property
    def crossing(self) -> Floats:
        """Seconds to send once all that crosses from an ideal to the rest, or back: both sides spend at least that."""
        found = np.zeros(len(self.inside))
        for output in self.atoms.outputs:
            ends = self.inside[:, (output.writer, *output.readers)]
            found += output.seconds * (ends.any(1) & ~ends.all(1))
        return found

    @cached_property
    def states(self) -> list[tuple[Output, NDArray[np.int32], Flags]]:
        """By output: the number of the state of each ideal, and of each state, whether writer and readers are in."""
        found = []
        for output in self.atoms.outputs:
            ends = self.inside[:, (output.writer, *output.readers)]
            keys = np.packbits(ends, axis=1)
            keys = keys[:, 0] if keys.shape[1] == 1 else np.ascontiguousarray(keys).view(f"V{keys.shape[1]}")[:, 0]
            _, first, number = np.unique(keys, return_index=True, return_inverse=True)
            found.append((output, number.reshape(-1).astype(np.int32), ends[first]))
        return found

    def only(self, wanted: Flags) -> "Family":
        """The ideals that are wanted."""
        return Family(self.atoms, self.inside[wanted])

    @cached_property
    def all_pairs(self) -> tuple[Floats, Floats]:
        """`between` for every ideal and every other."""
        every = np.arange(len(self.inside))
        return self._compared(every, every)

    def between(self, rows: Whole, columns: Whole) -> tuple[Floats, Floats]:
        """For stages of what `columns` hold beyond `rows`: seconds to send and receive, infinite where a row is not within its column;
        and the bytes of all outputs between atoms that the stage writes or reads.
        """
        if self.at_once:
            grid = np.ix_(rows, columns)
            seconds, passing = self.all_pairs
            return seconds[grid], passing[grid] if passing.strides[0] else np.broadcast_to(0.0, (len(rows), len(columns)))
        return self._compared(rows, columns)

    def _compared(self, rows: Whole, columns: Whole) -> tuple[Floats, Floats]:
        costs, choices, sizes = [], [], []
        crowded = any(output.read_bytes for output in self.atoms.outputs)
        for output, number, held in self.states:
            some, small = np.unique(number[rows], return_inverse=True)
            many, large = np.unique(number[columns], return_inverse=True)
            writes, reads, sends = _touched(held[some], held[many])
            if (writes | reads).any():
                costs.append((output.seconds * (sends | reads))[small])
                choices.append(np.arange(len(many)) == large[:, None])
                sizes.append((output.written_bytes * writes + output.read_bytes * reads)[small] if crowded else costs[-1][:, :0])
        shape = (len(rows), len(columns))
        if not costs:
            return self._ordered(rows, columns, np.zeros(shape)), np.broadcast_to(0.0, shape)
        chosen = np.concatenate(choices, axis=1).T.astype(np.float64)
        passing = np.concatenate(sizes, axis=1) @ chosen if crowded else np.broadcast_to(0.0, shape)
        return self._ordered(rows, columns, np.concatenate(costs, axis=1) @ chosen), passing

    def _ordered(self, rows: Whole, columns: Whole, seconds: Floats) -> Floats:
        """`seconds`, infinite where the row holds an atom that the column does not."""
        lower, upper = self.inside[rows], self.inside[columns]
        varied = lower.any(0) & ~upper.all(0)
        beyond = lower[:, varied].astype(np.float32) @ (~upper[:, varied]).T.astype(np.float32)
        seconds[beyond > 0.5] = np.inf
        return seconds


def family(atoms: Atoms, ideals: Sequence[int]) -> Family:
    """The table of `ideals`."""
    width = (len(atoms.members) + 7) // 8
    packed = np.frombuffer(b"".join(ideal.to_bytes(width, "little") for ideal in ideals), dtype=np.uint8).reshape(len(ideals), width)
    return Family(atoms, np.unpackbits(packed, axis=1, count=len(atoms.members), bitorder="little").astype(bool))


def _touched(small: Flags, large: Flags) -> tuple[Flags, Flags, Flags]:
    """For each state of a smaller ideal beside each of a larger: whether the stage between writes, reads, sends the output."""
    fresh = large[None] & ~small[:, None]  # (states, states, ends)
    writes, others = fresh[:, :, 0], fresh[:, :, 1:]
    return writes, ~writes & others.any(2), writes & ~others.all(2)
