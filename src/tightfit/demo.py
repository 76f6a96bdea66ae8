"""Demo: the main job in a minute, on a model that comes with the package: plan, stream, report, and the plan of a 70B."""

from dataclasses import replace
from typing import Any

from rich.console import Console

from tightfit.terms.budget import Budget
from tightfit.terms.machine import Machine
from tightfit.terms.units import GIB, MIB, show_bytes
from tightfit.terms.workload import Workload

MODEL = "tightfit-demo"
PROMPT = "The sea was calm that morning, and"
ROOM = 12 * MIB
"""What the demo gives to tensors: little more than half of the model's weights."""
SPARE = 12 * MIB
"""For what Python itself allocates meanwhile."""


def demo(out: Console) -> dict[str, Any]:
    """Print everything a newcomer should see, text as it is written; the plans and the report as values."""
    from tightfit import show, verbs
    from tightfit.describe.source import describe
    from tightfit.runtime.generate import Sampling
    from tightfit.runtime.process import keep_heap_tight, keep_quiet, resident, return_freed_memory

    keep_quiet()
    keep_heap_tight()
    skeleton = describe(MODEL)
    warm_up()
    return_freed_memory()
    held = resident().total
    budget = Budget(ram=held + SPARE + ROOM, disk=GIB)
    machine = replace(Machine.here(), overhead_ram=held + SPARE, allocator_slack=0.0)
    out.rule("1  a model that is bigger than its memory")
    out.print(
        f"`{MODEL}` weighs {show_bytes(skeleton.weight_bytes())}. Python and its libraries hold {show_bytes(held)} already, and keep "
        f"{show_bytes(SPARE)} for themselves; the model gets {show_bytes(ROOM)}."
    )
    plan = verbs.plan(MODEL, Workload(tokens=16, new_tokens=80), budget, machine=machine)
    show.show_plan(plan, out)
    out.rule("2  the text, while its blocks stream from disk")

    def listen(piece: str) -> None:
        out.file.write(piece)
        out.file.flush()

    listen(PROMPT)
    report = verbs.run(plan, PROMPT, Sampling(temperature=0.7, seed=2), listen)
    out.print()
    out.rule("3  the report, held against the plan")
    show.show_report(report, out)
    out.rule("4  the plan of a 70B model on a 24 GiB card, without its weights")
    planned = verbs.plan(
        "llama-2-70b", Workload(tokens=512, new_tokens=128), Budget(gpu=24 * GIB, ram=64 * GIB, disk=0), quality="near", alternatives=True
    )
    show.show_plan(planned, out)
    return {"report": report.to_json(), "plan_70b": planned.to_json()}


def warm_up() -> None:
    """Load what a run loads besides its tensors (libraries, tokenizer, kernels), so that the budget can be told exactly."""
    from tightfit import verbs
    from tightfit.runtime.generate import Sampling

    budget = Budget(ram=Budget.here().ram)  # on the CPU, as the demo
    verbs.run(verbs.plan(MODEL, Workload(tokens=16, new_tokens=8), budget), PROMPT, Sampling(temperature=0.7))
