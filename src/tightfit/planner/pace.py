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
    """`seconds` by name (see `Plan.seconds`), and `whole`: the workload from the first token read to the last written."""

    seconds: Mapping[str, float]
    whole: float


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
    encode = machine.encode_seconds(weights.stored, names) if fast == "ram" else 0.0  # a GPU encodes faster than a disk reads
    load = weights.stored / machine.disk_bandwidth + encode
    if workload.task == "generate":
        prefill = max(
            compute_seconds(footprint.work_of("encoder"), fast, machine) + compute_seconds(footprint.work_of("prefill"), fast, machine),
            stream,
        )
        token = max(compute_seconds(footprint.work_of("decode"), fast, machine), stream)
        seconds = {"load": load, "prefill": prefill, "token": token, "stream": stream}
        return Pace(seconds, prefill + max(0, workload.new_tokens - 1) * token)
    passes = 2 if workload.task == "tune" else 1
    step = max(compute_seconds(footprint.work_of(""), fast, machine), passes * stream)
    return Pace({"load": load, "step": step, "stream": stream}, step)


def transfer_seconds(weights: Weights, residency: Residency, fast: str, machine: Machine) -> float:
    """One pass over the streamed blocks: disk and link work side by side, so the slower one counts."""
    moved = {"ram": 0, "disk": 0}
    for position in residency.streamed:
        moved[residency.homes[position]] += weights.blocks[position]
    over_link = (moved["ram"] + moved["disk"]) / machine.link_bandwidth if fast == "gpu" else 0.0
    return max(moved["disk"] / machine.disk_bandwidth, over_link)
