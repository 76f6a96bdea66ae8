"""One row of fits_as_promised in its own process: plan, run, and print one JSON object.

`python one.py ROW.json allocator`: tensor bytes at the peak, from the CPU allocator's own records (torch's profiler), not from our meter.
`python one.py ROW.json process`: the process's peak by the kernel's count, without the profiler's own memory.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

import tightfit
from tightfit import steps
from tightfit.describe.source import describe
from tightfit.rehearse.allocator import allocator_peak
from tightfit.rehearse.fake import inputs_for
from tightfit.runtime.build import Built, build
from tightfit.runtime.generate import Sampling, generate
from tightfit.runtime.process import keep_heap_tight, keep_quiet, resident
from tightfit.runtime.tokens import Prompt
from tightfit.terms.errors import TightfitError


def whole_ids(shape: tuple[int, ...], high: int) -> torch.Tensor:
    """Random token ids below `high`, the same in every run."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(0))


def work(plan: tightfit.Plan, built: Built) -> None:
    """The planned workload on real tensors; two steps when tuning, since the first finds no optimizer state."""
    batch = inputs_for(built.model, plan.workload, whole_ids)
    if plan.workload.task == "generate":
        generate(built, Prompt(batch["input_ids"]), Sampling(ignore_eos=True))
    elif plan.workload.task == "tune":
        built.model.train()
        optimizer = steps.make_optimizer(built.model, plan.workload.optimizer)
        for _ in range(2):
            steps.train_step(built.model, batch, optimizer)
    else:
        with torch.inference_mode():
            steps.embed(built.model, batch)


def carry_out(plan: tightfit.Plan) -> None:
    """Build and run, as `tightfit run` does."""
    with build(plan, describe(plan.model, plan.workload.task, random_weights=plan.random_weights)) as built:
        work(plan, built)


def main() -> None:
    """Run the row that the first argument names, in the way that the second does."""
    keep_quiet()
    keep_heap_tight()
    row, way = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    workload = tightfit.Workload(row["task"], row.get("batch", 1), row["tokens"], row.get("new_tokens", 16))
    budget = tightfit.Budget.parse(ram=row["ram"])
    try:
        plan = tightfit.plan(row["model"], workload, budget, row.get("quality", "exact"), row.get("techniques", []), row.get("random_weights", True))
    except TightfitError as error:
        print(json.dumps({"error": str(error), "hint": error.hint, "details": error.details}))
        return
    result = {"predicted_peak_bytes": plan.tensor_bytes(), "predicted_process_bytes": plan.predicted_bytes("ram"), "budget_bytes": budget.ram}
    result |= {"techniques": list(plan.techniques), "predicted": plan.predicted["ram"], "resting": plan.resting()}
    if way == "allocator":
        unguarded = replace(plan, budget=replace(budget, ram=1 << 40))  # the records take memory themselves
        result["measured_peak_bytes"] = allocator_peak(lambda: carry_out(unguarded))
    else:
        carry_out(plan)
        result["process_peak_bytes"] = resident().peak
    print(json.dumps(result))


if __name__ == "__main__":
    main()
