"""Blocks: one block of a large model with random weights, quantized by the verb that users call. Prints one JSON line.

Started by run.py in a process of its own, with the job as JSON. The block's text, Hessians, solves, and its way to the disk are timed;
the hours of the whole model are reckoned from them.
"""

import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from stages import clock_of, solver_parts, watched

from tightfit.describe.source import describe
from tightfit.runtime import quantize as steps
from tightfit.runtime.placing import Placing
from tightfit.runtime.process import keep_quiet, resident
from tightfit.terms.budget import Budget
from tightfit.terms.machine import Machine
from tightfit.terms.units import parse_size
from tightfit.verbs.quantizing import plan_quantize, quantize

Job = dict[str, Any]
INSIDE = ("read", "alike", "hessians", "advance", "factor", "grid", "walk", "errors", "descents", "refits", "solving")
"""Stages of a block, but for writing it."""


def one_block(model: str, folder: Path, device: str) -> int:
    """Write a model of that shape with one block, in bfloat16. How many it has by right."""
    skeleton = describe(model, random_weights=True)
    depth = skeleton.config.num_hidden_layers
    skeleton.config.num_hidden_layers, skeleton.config.dtype = 1, torch.bfloat16
    small = replace(skeleton, dtype=torch.bfloat16, origins={})
    wanted = small.meta_model().state_dict()
    draw = torch.Generator(device).manual_seed(0)
    tensors = {
        name: torch.ones_like(tensor, device="cpu")
        if tensor.dim() == 1
        else torch.empty(tensor.shape, dtype=tensor.dtype, device=device).normal_(0, 0.02, generator=draw).cpu()
        for name, tensor in wanted.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads(skeleton.config.to_json_string(use_diff=False))
    (folder / "config.json").write_text(json.dumps(values | {"architectures": [skeleton.model_class.__name__]}))
    return depth


def cap_allocator(job: Job) -> int:
    """Let torch's allocator refuse what goes beyond the budget, less what the context takes beside it. Bytes, 0 without a GPU."""
    if job["device"] == "cpu":
        return 0
    cap = parse_size(job["gpu"]) - Machine.here().overhead_gpu
    torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
    return cap


def block_parts() -> list[tuple[Any, str, str]]:
    """The stages of a block around those of its solver."""
    names = {"alike": "alike", "hessian_of": "hessians", "_solve": "solving", "advance": "advance"}
    names |= {"write_tensors": "write", "first_states": "first_states"}
    return [(Placing, "place_block", "read"), *((steps, name, stage) for name, stage in names.items()), *solver_parts()]


def timed_block(job: Job, room: Path) -> Job:
    """Plan and quantize; seconds of the block, and of the whole model by its depth."""
    depth = one_block(job["model"], room / "model", job["device"])
    samples = torch.randint(
        0, 30000 if not job["dry"] else 100, (job["samples"], job["tokens"]), generator=torch.Generator().manual_seed(0)
    )
    on_gpu = job["device"] != "cpu"
    budget = Budget(parse_size(job["ram"]), parse_size(job["gpu"]) if on_gpu else 0, parse_size(job["disk"]))
    planned = plan_quantize(str(room / "model"), samples, job["technique"], job["settings"], budget)
    cap = cap_allocator(job)
    clock = clock_of("cuda") if on_gpu else time.perf_counter
    with watched(block_parts(), clock) as stages:
        began = clock()
        report = quantize(planned, samples, str(room / "small"))
        whole = clock() - began
    block = stages.spans["advance"][1] - stages.spans["read"][0]
    weights = planned.weights
    return {
        "cap_bytes": cap,
        "states_on": planned.states_on,
        "predicted": dict(planned.predicted),
        "predicted_bytes": planned.predicted_bytes - planned.predicted.get("overhead", 0),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else 0,
        "process_peak_bytes": max(report.peak_bytes, resident().peak),
        "block_weights": weights,
        "seconds_per_block": block,
        "once_seconds": whole - block,
        "million_weights_per_second": weights / block / 1e6,
        "share": {name: stages.seconds[name] / block for name in INSIDE},
        "blocks": depth,
        "hours": (whole - block + depth * block) / 3600,
    }


def main() -> None:
    """Run the job in the first argument."""
    keep_quiet()
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory(prefix="tightfit-block-") as room:
        print(json.dumps(timed_block(job, Path(room)), default=list))


if __name__ == "__main__":
    main()
