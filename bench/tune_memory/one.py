"""One of our runs of tune_memory in its own process: build, take steps, and print one JSON line. Started by run.py with the job as JSON.

`{"way": "allocator"}`: tensor bytes at the peaks of loading and of the steps, from the CPU allocator's own records.
`{"way": "process"}`: the process's memory beyond what it held before, by the kernel's count, and seconds per step.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fits_as_promised"))
import bitsandbytes  # noqa: F401 - both first, so that the memory before counts them
import peft  # noqa: F401
import transformers  # noqa: F401
from tuning import made, resident_plan, stepper, timed_steps
from witness import mark_run, witness

import tightfit
from tightfit.describe.source import describe
from tightfit.rehearse.rehearsal import rehearse
from tightfit.runtime.build import build
from tightfit.runtime.process import keep_heap_tight, keep_quiet, reset_peak, resident
from tightfit.terms.errors import TightfitError

Job = dict[str, Any]


def run(job: Job, began_running: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Build the model and take the job's steps."""
    skeleton = describe(job["model"], "tune")
    workload = tightfit.Workload("tune", job["batch"], job["tokens"], micro_batch=job["batch"])
    with build(resident_plan(skeleton, workload, job["techniques"]), skeleton) as built:
        step = stepper(built)
        load_peak = resident().peak
        reset_peak()
        began_running()
        found = timed_steps(step, job["warm_up"], job["steps"])
        return found | {
            "load_seconds": built.load_seconds,
            "load_peak_rss_bytes": load_peak,
            "peak_rss_bytes": resident().peak,
        }


def main() -> None:
    """Run the job in the first argument."""
    keep_quiet()
    job, before = json.loads(sys.argv[1]), resident()
    if job.get("heap", "tight") == "tight":
        keep_heap_tight()
    try:
        if job["way"] == "allocator":
            workload = tightfit.Workload("tune", job["batch"], job["tokens"], micro_batch=job["batch"])
            footprint = rehearse(describe(job["model"], "tune").meta_model, workload, made(job["techniques"]))
            found = witness(lambda: run(job, mark_run)) | {"predicted_peak_bytes": footprint.peak_bytes, "predicted": footprint.peak}
        else:
            found = run(job) | {"rss_bytes_before": before.total}
    except TightfitError as error:
        found = {"error": str(error)}
    print(json.dumps(found, default=list))


if __name__ == "__main__":
    main()
