"""Plan a training step inside a budget, load, take whole steps, and print one JSON line: what was promised and what was measured.

python tune.py --model FOLDER --ram SIZE --technique NAME… --batch B --tokens T --steps S [--warm-up W]

The script sets no limit: start it inside cgroup.py. Threads come from OMP_NUM_THREADS. The planner chooses the micro-batch, whether
blocks stream, and whether they are recomputed.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))
from peer_common import disk_read_bytes, memory_now
from record import plan_digest
from tuning import stepper, timed_steps

import tightfit
from tightfit.describe.source import describe
from tightfit.runtime.build import build
from tightfit.runtime.process import keep_heap_tight, keep_quiet, reset_peak, resident
from tightfit.terms.errors import TightfitError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ram", required=True)
    parser.add_argument("--disk", default="100GiB")
    parser.add_argument("--technique", action="append", default=[])
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warm-up", type=int, default=0)
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plan, build, take steps, and say how it went."""
    workload, budget = tightfit.Workload("tune", args.batch, args.tokens), tightfit.Budget.parse(ram=args.ram, disk=args.disk)
    plan = tightfit.plan(args.model, workload, budget, "near", args.technique)
    with build(plan, describe(args.model, "tune")) as built:
        step = stepper(built)
        load_peak, load_read = resident().peak, disk_read_bytes()
        reset_peak()
        found = timed_steps(step, args.warm_up, args.steps)
        run_peak = resident().peak
        return found | {
            "tokens_per_second": args.batch * args.tokens / found["seconds_per_step"],
            "load_seconds": built.load_seconds,
            "process_peak_bytes": max(load_peak, run_peak),
            "load_peak_bytes": load_peak,
            "run_peak_bytes": run_peak,
            "predicted_process_bytes": plan.predicted_bytes("ram"),
            "predicted_peak_bytes": plan.tensor_bytes(),
            "predicted_seconds_per_step": plan.seconds["step"],
            "predicted_seconds": plan.seconds,
            "micro_batch": plan.workload.rows,
            "streamed_bytes_per_pass": plan.streamed_bytes,
            "streamed_bytes_per_step": plan.streamed_bytes * plan.workload.passes * (1 if "side" in plan.techniques else 2),
            "read_bytes_per_step": (disk_read_bytes() - load_read) / (args.warm_up + args.steps),
            "techniques": {name: dict(values) for name, values in plan.techniques.items()},
            "resting": plan.resting(),
            "predicted": plan.predicted,
            "plan_digest": plan_digest(plan.to_json()),
            **memory_now(),
            "disk_read_bytes": disk_read_bytes(),
        }


def main() -> int:
    keep_quiet()
    keep_heap_tight()
    args = parse_arguments()
    try:
        print(json.dumps({"peer": "tightfit", **run(args)}, default=list))
    except TightfitError as error:
        print(json.dumps({"peer": "tightfit", "error": str(error), "hint": error.hint, "details": error.details}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
