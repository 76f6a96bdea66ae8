"""Samples: token ids and labels of a whole data set, in flat arrays."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

IGNORED = -100
"""The label of a token that does not count, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Token ids and labels of all samples, one behind the other.  # ids: (tokens,) int32, labels: as many, or the decoder's

    `starts` and `label_starts` are where each begins, and where the last one ends (int64). `shifted`: a label is predicted from
    the tokens before it, so the first of a sample never is (decoder-only).
    """

    ids: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    label_starts: np.ndarray
    shifted: bool = True
    notes: tuple[str, ...] = ()
    digest: str = ""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and labels, -100 where nothing counts. Views, not to be written to."""
        return self.ids[self.starts[i] : self.starts[i + 1]], self.labels[self.label_starts[i] : self.label_starts[i + 1]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample; for encoder–decoder models of its longer side."""
        return np.maximum(np.diff(self.starts), np.diff(self.label_starts))

    @property
    def longest(self) -> int:
        """Tokens of the longest sample; for encoder–decoder models of what is read."""
        return int(np.diff(self.starts).max())

    @property
    def longest_target(self) -> int:
        """Tokens of the longest answer of an encoder–decoder model; 0 for a decoder, which has one side."""
        return 0 if self.shifted else int(np.diff(self.label_starts).max())

    @property
    def tokens(self) -> int:
        """Tokens that go into the model in an epoch; for encoder–decoder models, into the encoder."""
        return len(self.ids)

    @property
    def counted_tokens(self) -> int:
        """Tokens that the loss of an epoch is a mean over."""
        return int(_predicted(self.labels, self.label_starts, self.shifted).sum())

    @property
    def held_bytes(self) -> int:
        """What the samples take in memory."""
        arrays = {id(part): part.nbytes for part in (self.ids, self.labels, self.starts, self.label_starts)}
        return sum(arrays.values())


def _predicted(labels: np.ndarray, starts: np.ndarray, shifted: bool) -> np.ndarray:
    """Which labels count in the loss.  # (tokens,) bool"""
    counted = labels != IGNORED
    if shifted:
        counted[starts[:-1]] = False
    return counted


def without_unlearned(samples: Samples) -> Samples:
    """Windows in which nothing is predicted are left out."""
    if not samples.shifted or not len(samples):
        return samples
    learned = np.add.reduceat(_predicted(samples.labels, samples.starts, True), samples.starts[:-1], dtype=np.int64) > 0
    if learned.all():
        return samples
    lengths = np.diff(samples.starts)
    kept = np.repeat(learned, lengths)
    starts = np.append(0, np.cumsum(lengths[learned]))
    ids = samples.ids[kept]
    return Samples(ids, ids if samples.labels is samples.ids else samples.labels[kept], starts, starts)
