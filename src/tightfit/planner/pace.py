"""Pace: seconds from the rehearsal's operations and bytes, over the rates that the probe measured.

Each phase takes max(operations' bytes or products, transfers), since streaming runs beside computing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tightfit.planner.residency import Residency
from tightfit.planner.weigh import Weights
from tightfit.rehearse.clock import compute_seconds
from tightfit.terms.budget import Budget
from tightfit.terms.footprint import Footprint
from tightfit.terms.machine import Machine
from tightfit.terms.workload import Workload


@dataclass(frozen=True)
class Pace:
    """`seconds` by name (see `Plan.seconds`), and `whole`: the workload from the first token read to the last written.

    Of what is done most often (a token after the prompt, a step), `compute` and `transfer` go on side by side.
    """

    seconds: Mapping[str, float]
    whole: float
    compute: float
    transfer: float


def pace(
    footprint: Footprint,
    weights: Weights,
    residency: Residency,
    workload: Workload,
    budget: Budget,
    machine: Machine,
    names: Iterable[str] = (),
) -> Pace:
    """Predict the time of `workload` with the techniques `names`. Loading is told apart and is not part of `whole`."""
    fast = budget.compute_tier
    stream = transfer_seconds(weights, residency, fast, machine)
    load = load_seconds(weights, residency, fast, machine, names)
    if workload.task == "generate":
        encoder, prompt, writing = (compute_seconds(footprint.work_of(stem), fast, machine) for stem in ("encoder", "prefill", "decode"))
        reading = encoder + prompt
        prefill, token = max(reading, stream), max(writing, stream)
        seconds = {"load": load, "prefill": prefill, "token": token, "stream": stream}
        often = writing if workload.new_tokens > 1 else reading
        return Pace(seconds, prefill + max(0, workload.new_tokens - 1) * token, often, stream)
    update = compute_seconds(footprint.work_of("optimizer"), fast, machine)
    passed = compute_seconds(footprint.work_of(""), fast, machine) - update
    compute, transfer = workload.passes * passed + update, workload.passes * (2 if workload.task == "tune" else 1) * stream
    step = max(compute, transfer)
    return Pace({"load": load, "step": step, "stream": stream}, step, compute, transfer)


def load_seconds(weights: Weights, residency: Residency, fast: str, machine: Machine, names: Iterable[str]) -> float:
    """What stays in the model's own files is not read; what rests on disk in another form is read, encoded and written once.

    Writing is taken to be as fast as reading.
    """
    on_disk = sum(size for size, home in zip(weights.blocks, residency.homes, strict=True) if home == "disk")
    moved = weights.stored + on_disk if weights.changed else weights.stored - on_disk
    encode = machine.encode_seconds(weights.stored, names) if fast == "ram" else 0.0  # a GPU encodes faster than a disk reads
    return moved / machine.disk_bandwidth + encode


def transfer_seconds(weights: Weights, residency: Residency, fast: str, machine: Machine) -> float:
    """One pass over the streamed blocks: disk and link work side by side, so the slower one counts."""
    moved = {"ram": 0, "disk": 0}
    for position in residency.streamed:
        moved[residency.homes[position]] += weights.blocks[position]
    over_link = (moved["ram"] + moved["disk"]) / machine.link_bandwidth if fast == "gpu" else 0.0
    return max(moved["disk"] / machine.disk_bandwidth, over_link)
