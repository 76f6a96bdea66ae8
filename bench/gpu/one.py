"""One job of the GPU benchmark in its own process; prints one JSON line. Started by run.py with the job as JSON."""

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from record import plan_digest
from resting import resting_bytes
from tuning import stepper, timed_steps

import tightfit
from tightfit import catalog
from tightfit.describe.source import describe
from tightfit.rehearse.fake import inputs_for, materialize
from tightfit.runtime.build import build
from tightfit.runtime.generate import Sampling, generate
from tightfit.runtime.placing import restore_buffers
from tightfit.runtime.process import keep_heap_tight, keep_quiet, resident
from tightfit.runtime.tokens import Prompt
from tightfit.runtime.weights import reader
from tightfit.terms.footprint import total
from tightfit.terms.machine import Machine
from tightfit.terms.units import parse_size

Job = dict[str, Any]
ON_GPU = torch.cuda.is_available()


def workload_of(job: Job) -> tightfit.Workload:
    """The prompt and the tokens to write, or the training step."""
    if job["side"] == "tune":
        return tightfit.Workload("tune", job["batch"], job["tokens"], micro_batch=job.get("micro_batch", 0))
    return tightfit.Workload("generate", 1, job["prompt_tokens"], job["new_tokens"])


def cap_allocator(job: Job) -> int:
    """Let torch's allocator refuse what goes beyond the budget, less what the context takes beside it. Bytes, 0 without a GPU."""
    if not ON_GPU:
        return 0
    cap, whole = parse_size(job["gpu"]) - Machine.here().overhead_gpu, torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(cap / whole)
    return cap


def peaks() -> dict[str, int]:
    """The peaks of torch's allocator, and of the process."""
    gpu = {"allocated_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()} if ON_GPU else {}
    return gpu | {"process_peak_bytes": resident().peak}


def budget_of(job: Job, skeleton: Any) -> tightfit.Budget:
    """The job's budget; in a dry run one in which half of the blocks stream from disk."""
    if not job["dry"]:
        return tightfit.Budget(ram=parse_size(job["ram"]), gpu=parse_size(job["gpu"]))
    techniques = dict(catalog.parse(text) for text in job["techniques"])
    boundless = tightfit.Budget(ram=1 << 50, disk=1 << 50)
    whole = tightfit.plan(job["model"], workload_of(job), boundless, job["quality"], job["techniques"], random_weights=True)
    blocks, _ = resting_bytes(skeleton, techniques)
    highest = max(total(parts) for parts in whole.phases.values()) + whole.predicted["ram"]["overhead"]
    return tightfit.Budget(ram=int(highest - (1 - job["resident"]) * blocks), disk=1 << 50)


def ours(job: Job) -> dict[str, Any]:
    """Plan, load, write; what was promised and what was measured, with the floor of a token."""
    keep_heap_tight()
    began = time.perf_counter()
    skeleton = describe(job["model"], random_weights=True)
    plan = tightfit.plan(job["model"], workload_of(job), budget_of(job, skeleton), job["quality"], job["techniques"], random_weights=True)
    plan_seconds = time.perf_counter() - began
    cap = cap_allocator(job)
    with build(plan, skeleton) as built:
        load_peaks = peaks()
        ids = inputs_for(built.model, plan.workload)["input_ids"] + 7
        report = generate(built, Prompt(ids), Sampling(ignore_eos=True))
    machine, (blocks, outside) = Machine.here(), resting_bytes(skeleton, {name: {} for name in job["techniques"]})
    link, memory = (machine.link_bandwidth, machine.gpu_bandwidth) if ON_GPU else (machine.disk_bandwidth, machine.memory_bandwidth)
    floor = max(plan.streamed_bytes / link, (blocks + outside) / memory)
    measured = report.gpu.get("allocated", report.measured_bytes)
    return {
        "cap_bytes": cap,
        "plan_seconds": plan_seconds,
        "predicted_peak_bytes": plan.tensor_bytes(),
        "measured_peak_bytes": measured,
        "deviation": measured / plan.tensor_bytes() - 1,
        "reserved_peak_bytes": report.gpu.get("reserved", 0),
        "load_peaks": load_peaks,
        "budget_bytes": plan.budget.bytes_of(plan.compute_tier),
        "process_peak_bytes": max(report.process["load_peak"], report.process["run_peak"]),
        "predicted_process_bytes": plan.predicted_bytes("ram"),
        "seconds_per_token": report.seconds["per_token"],
        "prefill_seconds": report.seconds["first_token"],
        "load_seconds": report.seconds["load"],
        "predicted_seconds": plan.seconds,
        "streamed_bytes_per_token": plan.streamed_bytes,
        "moved_bytes": report.moved_bytes,
        "floor_seconds_per_token": floor,
        "over_floor": report.seconds["per_token"] / floor,
        "techniques": list(plan.techniques),
        "resting": plan.resting(),
        "predicted": plan.predicted,
        "plan_digest": plan_digest(plan.to_json()),
        "warnings": report.warnings,
    }


def tuned(job: Job) -> dict[str, Any]:
    """Plan, load, take whole steps; what was promised and what was measured. The floor: what must cross the link, or the plan's compute."""
    keep_heap_tight()
    skeleton = describe(job["model"], "tune", random_weights=True)
    plan = tightfit.plan(job["model"], workload_of(job), budget_of(job, skeleton), job["quality"], job["techniques"], random_weights=True)
    cap = cap_allocator(job)
    with build(plan, skeleton) as built:
        step, load_peaks = stepper(built), peaks()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        found = timed_steps(step, job["warm_up"], job["steps"])
    found |= peaks()
    crossed = plan.streamed_bytes * plan.workload.passes * (1 if "side" in plan.techniques else 2)
    floor = crossed / (Machine.here().link_bandwidth if ON_GPU else Machine.here().disk_bandwidth)
    measured = found.get("allocated_bytes", 0)
    return found | {
        "cap_bytes": cap,
        "load_peaks": load_peaks,
        "predicted_peak_bytes": plan.tensor_bytes(),
        "measured_peak_bytes": measured,
        "deviation": measured / plan.tensor_bytes() - 1 if measured else None,
        "reserved_peak_bytes": found.get("reserved_bytes", 0),
        "tokens_per_second": job["batch"] * job["tokens"] / found["seconds_per_step"],
        "floor_seconds_per_step": floor,
        "over_floor": found["seconds_per_step"] / floor if floor else None,
        "predicted_seconds": plan.seconds,
        "micro_batch": plan.workload.rows,
        "streamed_bytes": plan.streamed_bytes,
        "load_seconds": built.load_seconds,
        "techniques": {name: dict(values) for name, values in plan.techniques.items()},
        "resting": plan.resting(),
        "predicted": plan.predicted,
        "plan_digest": plan_digest(plan.to_json()),
    }


def dense_model(job: Job) -> torch.nn.Module:
    """The whole model in RAM with random 16-bit weights, for the peer."""
    skeleton = describe(job["model"], random_weights=True)
    model, read = skeleton.meta_model(), reader(skeleton, random_weights=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    restore_buffers(model, torch.device("cpu"))
    materialize(model, lambda tensor: read(names[id(tensor)]) if id(tensor) in names else tensor)
    return model.requires_grad_(False)


def timed_generate(model: torch.nn.Module, job: Job, new_tokens: int) -> float:
    """Seconds of a greedy `generate` of exactly `new_tokens`."""
    ids = torch.full((1, job["prompt_tokens"]), 7, device="cuda" if ON_GPU else "cpu")
    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )
    return time.perf_counter() - began


def peer(job: Job) -> dict[str, Any]:
    """accelerate's CPU offload under the same cap; it gets less room, step by step, where it runs out of memory."""
    import accelerate

    cap = cap_allocator(job)
    began = time.perf_counter()
    model = dense_model(job)
    load_seconds = time.perf_counter() - began
    for share in (0.95, 0.85, 0.7):
        room = ({0: int(share * cap)} if ON_GPU else {}) | {"cpu": parse_size(job["ram"])}
        device_map = accelerate.infer_auto_device_map(model, max_memory=room, no_split_module_classes=list(model._no_split_modules or []))
        try:
            placed = accelerate.dispatch_model(model, device_map, main_device=0 if ON_GPU else None, force_hooks=True)
            first = timed_generate(placed, job, 1)
            whole = timed_generate(placed, job, job["new_tokens"])
        except torch.cuda.OutOfMemoryError:
            accelerate.hooks.remove_hook_from_submodules(model)
            model.to("cpu")
            torch.cuda.empty_cache()
            continue
        seconds = (whole - first) / (job["new_tokens"] - 1)
        on_gpu = sum(place == 0 for place in device_map.values())
        return {
            "cap_bytes": cap,
            "room_share": share,
            "seconds_per_token": seconds,
            "prefill_seconds": first,
            "load_seconds": load_seconds,
            "modules_on_gpu": on_gpu,
            "modules": len(device_map),
            **peaks(),
        }
    return {"error": "out of GPU memory at every share that was tried"}


def gpu_facts() -> dict[str, Any]:
    """The card, as torch sees it."""
    if not ON_GPU:
        return {}
    card = torch.cuda.get_device_properties(0)
    return {"gpu": card.name, "gpu_bytes": card.total_memory, "cuda": torch.version.cuda}


def main() -> None:
    """Run the job in the first argument."""
    keep_quiet()
    job = json.loads(sys.argv[1])
    if job["side"] == "probe":
        from dataclasses import asdict

        from tightfit.runtime.probe import probe

        found = asdict(probe()) | gpu_facts()
    else:
        found = {"ours": ours, "tune": tuned, "accelerate": peer}[job["side"]](job)
    print(json.dumps(found, default=list))


if __name__ == "__main__":
    main()
