"""Quantizing: a model on its way into few bits, decided beforehand and measured afterwards; and the name under which its files say so."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tightfit.terms.budget import Budget
from tightfit.terms.footprint import total

METHOD = "tightfit"
"""The `quant_method` in `config.json`, by which transformers finds the loader."""

TOKENS_PER_COLUMN = 4
"""From which on aiming at the dense model helps tokens that were not read; with fewer it learns the text by heart."""


@dataclass(frozen=True)
class QuantizePlan:
    """A quantization, decided beforehand.

    - `technique` with `settings`; `samples` texts of `tokens` tokens are read, `rows` at a time (none where no inputs are needed);
    - `layers`: how many are quantized (matrices of fused experts one by one), with how many `weights`;
    - `states_on`: where the hidden states of all samples rest (`ram` or `disk`);
    - `predicted`: bytes by kind at the peak on the compute tier; `output_bytes`: what will be written;
    - `bits_per_weight`: of the quantized layers, tables and scales included;
    - `notes`: what a person should know of it.
    """

    model: str
    technique: str
    settings: Mapping[str, Any]
    samples: int
    tokens: int
    rows: int
    layers: int
    weights: int
    states_on: str
    budget: Budget
    predicted: Mapping[str, int]
    output_bytes: int
    bits_per_weight: float
    notes: tuple[str, ...] = ()

    @property
    def predicted_bytes(self) -> int:
        """All kinds at the peak."""
        return total(self.predicted)

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {**asdict(self), "predicted_bytes": self.predicted_bytes}


@dataclass(frozen=True)
class QuantizeReport:
    """What was measured: the process's peak by the kernel's count, and the time.

    `scores` tell how well it went, where that was asked; `notes`, what the text did not suffice for.
    """

    plan: QuantizePlan
    output: str
    peak_bytes: int
    seconds: float
    scores: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What did not go as promised."""
        over = self.peak_bytes > self.plan.budget.ram
        return ("the process went over its RAM budget; run `tightfit probe`, then try again",) if over else ()

    def to_json(self) -> dict[str, Any]:
        """One JSON object: the plan under `plan`, and beside it what was measured."""
        values = {name: value for name, value in asdict(self).items() if name != "plan"}
        return {"plan": self.plan.to_json(), **values, "warnings": list(self.warnings)}
