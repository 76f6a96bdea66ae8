"""Workload: what is asked of the model, in batch, tokens and optimizer."""

from dataclasses import dataclass, replace
from typing import Literal

Task = Literal["generate", "tune", "embed"]


@dataclass(frozen=True)
class Workload:
    """One kind of work.

    - `generate`: a prompt of `tokens` is read, then `new_tokens` are written one by one;
    - `tune`: one training step over `tokens` (forward, backward, `optimizer`);
    - `embed`: one forward pass over `tokens` (for images the model sets the length).

    For encoder–decoder models `tokens` is the encoder's length and, when tuning, the decoder's too.
    """

    task: Task = "generate"
    batch: int = 1
    tokens: int = 512
    new_tokens: int = 128
    optimizer: str = "adamw"

    @property
    def context(self) -> int:
        """The longest sequence that the cache must hold."""
        return self.tokens + (self.new_tokens if self.task == "generate" else 0)

    def with_tokens(self, tokens: int) -> "Workload":
        """The same work at another length."""
        return replace(self, tokens=tokens)
