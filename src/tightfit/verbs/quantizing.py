"""Verbs of quantizing: read the text that shows what a model's layers are fed, plan, solve. They only pass values from room to room."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tightfit import catalog
from tightfit.contracts import Solves
from tightfit.describe.lengths import check_lengths, positions_of
from tightfit.describe.skeleton import Skeleton
from tightfit.describe.source import describe
from tightfit.planner.solving import Calibration, plan_solving
from tightfit.runtime.evaluate import read_text
from tightfit.runtime.process import keep_heap_tight, reset_peak, resident
from tightfit.runtime.quantize import Job, refuse_model
from tightfit.runtime.quantize import quantize as solve_all
from tightfit.runtime.tokens import load_tokenizer
from tightfit.runtime.weights import refuse_weightless
from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError
from tightfit.terms.machine import Machine
from tightfit.terms.quantizing import QuantizePlan, QuantizeReport

LONGEST = 512
"""Tokens of a calibration sample where nobody says how many; fewer where the model has fewer positions."""

SAMPLES = 128
"""Calibration samples at most, as GPTQ and LeanQuant take them."""

_ROWS_TOKENS = 2048
"""Tokens that go through a block at once."""


def read_calibration(model: str | Skeleton, text: str, context: int = 0, samples: int = SAMPLES) -> Tensor:
    """The text of a file as samples of equal length, evenly taken from the whole of it.  # → (samples, tokens)

    Raises `TightfitError` for a text shorter than one sample, and for a model without a tokenizer.
    """
    skeleton = _described(model)
    refuse_weightless(skeleton)
    tokens = context or min(LONGEST, positions_of(skeleton.config) or LONGEST)
    check_lengths(skeleton.config, tokens)
    tokenizer = load_tokenizer(skeleton)
    if tokenizer is None:
        raise TightfitError(f"`{skeleton.name}` has no tokenizer, so no text can be read", hint="put `tokenizer.json` beside the weights")
    ids = torch.tensor(tokenizer(read_text(text), verbose=False)["input_ids"], dtype=torch.long)
    whole = len(ids) // tokens
    if not whole:
        raise TightfitError(
            f"`{text}` has {len(ids)} tokens, fewer than one sample of {tokens}",
            hint="name a longer text, some ten thousand words of what the model will be used for, or a shorter `--context`",
        )
    at_once = max(1, _ROWS_TOKENS // tokens)
    count = min(samples, whole)
    count -= count % at_once if count > at_once else 0  # so that all parts are full
    return ids[: whole * tokens].view(whole, tokens)[torch.arange(count) * whole // count]


def plan_quantize(
    model: str | Skeleton,
    samples: Tensor | None,
    technique: str = "lean",
    settings: Mapping[str, Any] | None = None,
    budget: Budget | None = None,
) -> QuantizePlan:
    """Say beforehand what quantizing `model` takes. `samples` (samples, tokens) may be left out where no inputs are needed.

    Raises `DoesNotFit` when the budget is too small, and `TightfitError` for faults of the input. No weight is read.
    """
    skeleton = _described(model)
    solver = _solver(technique, settings or {})
    if solver.needs_inputs() and samples is None:
        raise TightfitError(
            f"`{technique}` needs a text that shows what the layers are fed",
            hint="name a text file after the model; `--technique rtn` needs none",
        )
    refuse_model(skeleton, skeleton.meta_model())
    count, tokens = samples.shape if samples is not None and solver.needs_inputs() else (1, 1)
    text = Calibration(count, tokens, _rows(count, tokens))
    return plan_solving(skeleton, technique, settings or {}, solver, text, budget or Budget.here(), Machine.here())


def quantize(
    planned: QuantizePlan,
    samples: Tensor | None,
    output: str,
    resume: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, whole, layer: None,
) -> QuantizeReport:
    """Carry `planned` out: write the model in few bits to the folder `output`, which plain `from_pretrained` then loads.

    Raises `TightfitError`, and leaves `output` untouched; `resume` goes on after the last block that was finished.
    """
    shape = (1, 1) if samples is None else tuple(samples.shape)
    if planned.samples * planned.tokens > 1 and shape != (planned.samples, planned.tokens):
        raise TightfitError(
            f"the plan is for {planned.samples} samples of {planned.tokens} tokens", hint="give those that it was made with"
        )
    keep_heap_tight()
    skeleton, solver = describe(planned.model, "embed"), _solver(planned.technique, planned.settings)
    device = torch.device("cuda" if planned.budget.gpu else "cpu")
    ids = samples if samples is not None and solver.needs_inputs() else torch.ones(1, 1, dtype=torch.long)
    job = Job(skeleton, solver, ids, planned.rows, device, planned.states_on == "disk", progress)
    reset_peak()
    began = time.perf_counter()
    solve_all(job, Path(output), resume)
    notes = (f"too little of the text reaches {job.rounded} experts; they are rounded as they are",) if job.rounded else ()
    return QuantizeReport(planned, output, resident().peak, time.perf_counter() - began, notes=notes)


def _described(model: str | Skeleton) -> Skeleton:
    """As the architecture that the folder names: a head is kept, whatever it is for. A hub's weights are not fetched."""
    return model if isinstance(model, Skeleton) else describe(model, "embed", fetch=False)


def _solver(technique: str, settings: Mapping[str, Any]) -> Solves:
    found = catalog.make(technique, settings)
    if not isinstance(found, Solves):
        solvers = [name for name, kind in catalog.techniques().items() if issubclass(kind, Solves)]
        raise TightfitError(f"`{technique}` does not quantize to files", hint=f"one of {', '.join(solvers)} does")
    return found


def _rows(samples: int, tokens: int) -> int:
    """Samples at a time: all parts are of one size, so that masks fit them all."""
    most = max(1, _ROWS_TOKENS // tokens)
    return max(rows for rows in range(1, min(most, samples) + 1) if samples % rows == 0)
