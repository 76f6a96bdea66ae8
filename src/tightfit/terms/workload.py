"""Workload: what is asked of the model, in batch, tokens and optimizer."""

from dataclasses import dataclass, replace
from typing import Literal

Task = Literal["generate", "tune", "embed"]
Precision = Literal["no", "bf16"]
"""Mixed precision, in accelerate's words."""


@dataclass(frozen=True)
class Workload:
    """One kind of work.

    - `generate`: a prompt of `tokens` is read, then `new_tokens` are written one by one;
    - `tune`: one training step over `batch` sequences of `tokens` (forward, backward, `optimizer`), `micro_batch` at a time, the
      gradients summed, products in `precision` (`no`: as the weights are stored). A `micro_batch` of 0 leaves it to the planner, and
      is the whole batch everywhere else;
    - `embed`: one forward pass over `tokens` (for images the model sets the length).

    For encoder–decoder models `tokens` is the encoder's length and, when tuning, `target_tokens` the decoder's; 0: as many.
    """

    task: Task = "generate"
    batch: int = 1
    tokens: int = 512
    new_tokens: int = 128
    optimizer: str = "adamw"
    micro_batch: int = 0
    precision: Precision = "no"
    target_tokens: int = 0

    @property
    def rows(self) -> int:
        """Sequences that go through the model at once."""
        return self.micro_batch or self.batch

    @property
    def passes(self) -> int:
        """How many forward (and backward) passes the batch takes."""
        return -(-self.batch // self.rows)

    @property
    def context(self) -> int:
        """The longest sequence that the cache must hold."""
        return self.tokens + (self.new_tokens if self.task == "generate" else 0)

    def with_tokens(self, tokens: int) -> "Workload":
        """The same work at another length."""
        return replace(self, tokens=tokens)
