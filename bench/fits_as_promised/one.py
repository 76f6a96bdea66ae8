"""One row of fits_as_promised in its own process: plan, run, and print one JSON object.

`python one.py ROW.json allocator`: tensor bytes at the peaks of loading and of running, from the CPU allocator's own records.
`python one.py ROW.json process`: the process's peak by the kernel's count, without the profiler's own memory.
`python one.py ROW.json alive`: what is alive at the peak, largest first, with the operators that made it; for finding a wrong promise.

The budget is the tightest that can be promised: what the plan says loading and running need, or, with `resident = 0.4`, what is
left of that when only 40 % of the blocks' bytes may stay. With `ram` it is that size.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from record import plan_digest
from resting import resting_bytes
from witness import mark_run, witness

import tightfit
from tightfit import catalog, steps
from tightfit.describe.source import describe
from tightfit.rehearse.fake import inputs_for
from tightfit.runtime.build import Built, build
from tightfit.runtime.generate import Sampling, generate
from tightfit.runtime.process import keep_heap_tight, keep_quiet, resident
from tightfit.runtime.tokens import Prompt
from tightfit.terms.errors import TightfitError
from tightfit.terms.footprint import total
from tightfit.terms.machine import Machine
from tightfit.terms.units import MIB

BOUNDLESS = tightfit.Budget(ram=1 << 50, disk=1 << 50)


def whole_ids(shape: tuple[int, ...], high: int) -> torch.Tensor:
    """Random token ids below `high`, the same in every run."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(0))


def plan_row(row: dict[str, Any]) -> tightfit.Plan:
    """The row's plan inside its budget."""
    at_once = row["batch"] if row["task"] == "tune" else 0  # else a tight budget is met by splitting the batch
    workload = tightfit.Workload(row["task"], row["batch"], row["tokens"], row["new_tokens"], micro_batch=at_once)

    def planned(budget: tightfit.Budget) -> tightfit.Plan:
        return tightfit.plan(row["model"], workload, budget, "exact", row["techniques"], row["random_weights"])

    if "ram" in row:
        return planned(tightfit.Budget.parse(ram=row["ram"], disk="1TiB"))
    whole = planned(BOUNDLESS)
    tensors = max(total(parts) for parts in whole.phases.values()) - _leaving_bytes(row)
    need = tensors + whole.predicted["ram"]["overhead"] + int(Machine.here().allocator_slack * (tensors - whole.tensor_bytes()))
    return planned(tightfit.Budget(ram=(need // MIB + 1) * MIB, disk=BOUNDLESS.disk))


def _leaving_bytes(row: dict[str, Any]) -> int:
    """Bytes of blocks that the budget has no room for."""
    if row["resident"] == 1:
        return 0
    skeleton = describe(row["model"], row["task"], random_weights=row["random_weights"])
    blocks, _ = resting_bytes(skeleton, dict(catalog.parse(text) for text in row["techniques"]))
    return int((1 - row["resident"]) * blocks)


def work(plan: tightfit.Plan, built: Built) -> int:
    """The planned workload on real tensors, twice when tuning: the first step finds no optimizer state. Returns the process's peak."""
    batch = inputs_for(built.model, plan.workload, whole_ids)
    if plan.workload.task == "generate":
        report = generate(built, Prompt(batch["input_ids"]), Sampling(ignore_eos=True))
        return max(report.process["load_peak"], report.process["run_peak"])  # the peak begins anew between them
    if plan.workload.task == "tune":
        built.model.train()
        optimizer = steps.make_optimizer(built.model, plan.workload.optimizer)
        for _ in range(2):
            steps.train_step(built.model, batch, optimizer)
    else:
        with torch.inference_mode():
            steps.embed(built.model, batch)
    return resident().peak


def carry_out(plan: tightfit.Plan) -> int:
    """Build and run, as `tightfit run` does."""
    with build(plan, describe(plan.model, plan.workload.task, random_weights=plan.random_weights)) as built:
        mark_run()
        return work(plan, built)


def measure(plan: tightfit.Plan, way: str) -> dict[str, Any]:
    """What `way` sees of the run."""
    if way == "process":
        return {"process_peak_bytes": carry_out(plan)}
    unguarded = replace(plan, budget=replace(plan.budget, ram=BOUNDLESS.ram))  # the records take memory themselves
    return witness(lambda: carry_out(unguarded), shown=0 if way == "allocator" else 25)


def main() -> None:
    """Run the row that the first argument names, in the way that the second does."""
    keep_quiet()
    keep_heap_tight()
    row, way = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    try:
        plan = plan_row(row)
        result = {
            "predicted_peak_bytes": plan.tensor_bytes(),
            "predicted_load_bytes": total(plan.phases["load"]),
            "predicted_process_bytes": plan.predicted_bytes("ram"),
            "budget_bytes": plan.budget.ram,
            "techniques": list(plan.techniques),
            "resting": plan.resting(),
            "predicted": plan.predicted,
            "phases": plan.phases if way == "alive" else {},
            "plan_digest": plan_digest(plan.to_json()),
        }
        print(json.dumps(result | measure(plan, way)))
    except TightfitError as error:
        print(json.dumps({"error": str(error), "hint": error.hint, "details": error.details}))


if __name__ == "__main__":
    main()
