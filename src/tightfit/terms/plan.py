"""Plan: the decision as a value. What will be done, where every block rests, what it takes, how fast it will be, and why."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError
from tightfit.terms.footprint import total
from tightfit.terms.restore import restore
from tightfit.terms.workload import Workload

FORMAT = 1
"""Raised when an older tightfit could no longer read a saved plan."""


@dataclass(frozen=True)
class TurnedDown:
    """A way that was not taken, and why."""

    techniques: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Plan:
    """A run, decided beforehand.

    - `techniques`: name → settings, as `tightfit list` names them (streaming is `offload`);
    - `residency`: for each block by position the tier where its weights rest (`gpu`, `ram` or `disk`);
    - `predicted`: tier → kind → bytes at the peak; `phases`: the compute tier's peak of every phase;
    - `devices`: for each block the number of the GPU that holds and runs it, and `predicted_gpus` the same bytes as `predicted` for each
      GPU that is used; both empty where one is. `predicted` and `phases` tell those of the fullest GPU then;
    - `adapter`: the folder of what was learned on the model, if any;
    - `seconds`: `load`, and `prefill`, `token` and `stream` (generate) or `step` (tune, embed).
    """

    model: str
    workload: Workload
    budget: Budget
    quality: str
    techniques: Mapping[str, Mapping[str, Any]]
    residency: tuple[str, ...]
    predicted: Mapping[str, Mapping[str, int]]
    phases: Mapping[str, Mapping[str, int]]
    seconds: Mapping[str, float]
    streamed_bytes: int = 0
    random_weights: bool = False
    adapter: str = ""
    devices: tuple[int, ...] = ()
    predicted_gpus: tuple[Mapping[str, int], ...] = ()
    reasons: tuple[str, ...] = ()
    turned_down: tuple[TurnedDown, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def all_resident(cls, model: str, workload: Workload, blocks: int, techniques: Mapping[str, Mapping[str, Any]]) -> "Plan":
        """A plan without a budget: every block stays in RAM and nothing is predicted. For measuring what others predict."""
        return cls(model, workload, Budget(ram=1 << 62), "small", techniques, ("ram",) * blocks, {"ram": {"weights": 1}}, {}, {})

    @property
    def compute_tier(self) -> str:
        """`gpu` or `ram`."""
        return self.budget.compute_tier

    @property
    def gpus_used(self) -> int:
        """How many GPUs hold something."""
        return max(1, len(self.predicted_gpus)) if self.compute_tier == "gpu" else 0

    @property
    def fullest_gpu(self) -> int:
        """The number of the GPU whose bytes stand in `predicted`."""
        sizes = [total(parts) for parts in self.predicted_gpus]
        return sizes.index(max(sizes)) if sizes else 0

    def predicted_bytes(self, tier: str) -> int:
        """All kinds on `tier` at the peak."""
        return total(self.predicted.get(tier, {}))

    def tensor_bytes(self) -> int:
        """The compute tier's peak without the overhead: what an allocator shows."""
        parts = self.predicted[self.compute_tier]
        return total(parts) - parts.get("overhead", 0)

    def resting(self) -> dict[str, int]:
        """How many blocks rest on each tier."""
        return dict(Counter(self.residency))

    def to_json(self) -> dict[str, Any]:
        """The plan as one JSON object; `from_json` takes it back unchanged."""
        totals = {tier: total(parts) for tier, parts in self.predicted.items()}
        return {"format": FORMAT, **asdict(self), "predicted_bytes": totals, "resting": self.resting()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Plan":
        """The plan of `to_json`. Raises `TightfitError` for anything else."""
        try:
            if restore(int, values["format"]) > FORMAT:
                raise TightfitError("the plan was made by a newer tightfit", hint="upgrade, or plan again")
            plan: Plan = restore(cls, values)
            if plan.tensor_bytes() <= 0 or not set(plan.residency) <= {"gpu", "ram", "disk"}:
                raise TypeError("blocks without a tier")
            if (plan.devices or plan.predicted_gpus) and not plan._spread_well():
                raise TypeError("blocks without a GPU")
            return plan
        except (KeyError, TypeError) as error:
            raise TightfitError("this is not a plan of tightfit", hint="write one with `tightfit plan MODEL --save plan.json`") from error

    def _spread_well(self) -> bool:
        """Whether each block has a GPU of the budget, and each GPU that is used its bytes."""
        used = range(len(self.predicted_gpus))
        return len(self.devices) == len(self.residency) and {0, *self.devices} == set(used) and len(used) <= self.budget.gpus

    @classmethod
    def load(cls, file: str | Path) -> "Plan":
        """Read a saved plan."""
        try:
            return cls.from_json(json.loads(Path(file).read_text()))
        except OSError as error:
            raise TightfitError(f"cannot read the plan `{file}`: {error.strerror}") from error
        except ValueError as error:
            raise TightfitError(f"`{file}` is not JSON", hint="write a plan with `tightfit plan MODEL --save plan.json`") from error
