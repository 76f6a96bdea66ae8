"""Tuning: how a model learns, in the field's usual words. What it learns from, and inside which budget, is said elsewhere."""

from dataclasses import dataclass
from typing import Literal, get_args

from tightfit.terms.errors import TightfitError, near

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]
Learn = Literal["completion", "all"]


@dataclass(frozen=True)
class Tuning:
    """The settings of one run. A step is one update, after a whole batch.

    - `steps`: how many; 0 for as many as `epochs` take;
    - `learn`: `completion` counts the loss on answers only, `all` on every token; a plain text is learned whole in any case;
    - `evaluate_every`, `save_every`: steps between evaluations and checkpoints; 0: an evaluation at the end, a checkpoint each epoch;
    - `keep`: how many checkpoints stay; `clip`: the largest gradient norm, 0 for any;
    - `bad_share`: the share of lines of a data file that may be unreadable, and are then left out.
    """

    epochs: float = 1.0
    steps: int = 0
    learning_rate: float = 2e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.03  # share of the steps
    weight_decay: float = 0.0
    clip: float = 1.0
    learn: Learn = "completion"
    packing: bool = False
    seed: int = 0
    evaluate_every: int = 0
    save_every: int = 0
    keep: int = 2
    bad_share: float = 0.0

    def __post_init__(self) -> None:
        for what, name, known in (("schedule", self.schedule, get_args(Schedule)), ("way to learn", self.learn, get_args(Learn))):
            if name not in known:
                raise TightfitError(f"no {what} is called `{name}`", hint=near(name, known))
        counts = ("epochs", "steps", "learning_rate", "weight_decay", "clip", "evaluate_every", "save_every", "seed")
        for name in counts:
            if not 0 <= vars(self)[name] < float("inf"):
                raise TightfitError(f"`{name}` is a number from 0 on, not {vars(self)[name]}")
        if not (0 <= self.warmup <= 1 and 0 <= self.bad_share <= 1 and self.keep >= 1):
            raise TightfitError("`warmup` and `bad_share` are from 0 to 1, `keep` is at least 1")
