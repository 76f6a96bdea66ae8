"""Report: what a run took, held against its plan kind by kind."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tightfit.terms.errors import TightfitError
from tightfit.terms.footprint import total
from tightfit.terms.plan import Plan
from tightfit.terms.restore import restore

TOLERANCE = 0.05
"""A measurement further than this from the plan is a warning, and a bug in tightfit."""


@dataclass(frozen=True)
class Report:
    """What was measured.

    - `measured`: the compute tier's bytes by kind at the peak of the passes that were metered (tensors, no overhead);
    - `process`: the whole process by the kernel's count: `load_peak`, `run_peak`, `anonymous`, `file`, bytes;
    - `gpu`: `allocated` and `reserved` peaks of torch's allocator, and `load_reserved` while loading, bytes; empty without a GPU;
    - `seconds`: `load`, `first_token` and `per_token` (median), or of tuning `first_step` and `step` (median), `whole`, and `waited`
      for weights that were not there yet;
    - `moved_bytes`: what streaming moved; `tokens`: how many were written; `complete`: whether the whole planned workload ran;
    - `notes`: which kernels the quantized layers multiply with, so that a slow path is never a silent one;
    - `scores`: how well it went, such as `loss` and `held_out_loss` of tuning.
    """

    plan: Plan
    measured: Mapping[str, int]
    process: Mapping[str, int]
    seconds: Mapping[str, float]
    gpu: Mapping[str, int] = field(default_factory=dict)
    moved_bytes: int = 0
    tokens: int = 0
    complete: bool = True
    text: str = ""
    notes: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def measured_bytes(self) -> int:
        """Tensor bytes at the peak."""
        return total(self.measured)

    @property
    def deviation(self) -> float:
        """Measured over predicted tensor bytes, minus one: 0.02 is 2 % more than planned; 0 where nothing was measured."""
        if not self.measured_bytes:
            return 0.0
        return self.measured_bytes / self.plan.tensor_bytes() - 1

    @property
    def warnings(self) -> tuple[str, ...]:
        """What did not go as promised; empty when the word was kept."""
        found = []
        if self.deviation > TOLERANCE or (self.complete and self.deviation < -TOLERANCE):
            found.append(f"the peak was {self.deviation:+.1%} off the plan; please report this as a bug")
        peaks = {"loading": self.process.get("load_peak", 0), "running": self.process.get("run_peak", 0)}
        over = [doing for doing, peak in peaks.items() if peak > self.plan.budget.ram]
        if over:
            found.append(f"the process went over its RAM budget while {' and '.join(over)}; run `tightfit probe`, then plan again")
        if max(self.gpu.values(), default=0) > self.plan.budget.gpu > 0:
            found.append("the GPU allocator took more than the budget")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """One JSON object: the plan under `plan`, and beside it what was measured."""
        values = {name: value for name, value in asdict(self).items() if name != "plan"}
        return {
            "plan": self.plan.to_json(),
            **values,
            "predicted_peak_bytes": self.plan.tensor_bytes(),
            "measured_peak_bytes": self.measured_bytes,
            "deviation": self.deviation,
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Report":
        """The report of `to_json`. Raises `TightfitError` for anything else."""
        try:
            plan = Plan.from_json(values["plan"])
            report: Report = restore(cls, values)
            times = {"load", "first_step", "step"} if plan.workload.task == "tune" else {"load", "first_token", "per_token"}
            if missing := {"load_peak", "run_peak"} - report.process.keys() | times - report.seconds.keys():
                raise TypeError(f"without {', '.join(sorted(missing))}")
        except (KeyError, TypeError) as error:
            raise TightfitError(
                "this is not a report of tightfit", hint="write one with `tightfit run … --save-report report.json`"
            ) from error
        return report
