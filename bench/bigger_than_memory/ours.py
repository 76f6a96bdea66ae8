"""Plan inside a budget, load, write tokens, and print one JSON line: what was promised and what was measured.

python ours.py --model FOLDER --ram SIZE --quality exact|near [--technique NAME]… --prompt-tokens P --tokens N [--warm-up]

The script sets no limit: start it inside cgroup.py. Threads come from OMP_NUM_THREADS.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))
import torch
from peer_common import disk_read_bytes, greedy_decode, memory_now, prompt_ids
from record import plan_digest
from resting import resting_bytes

import tightfit
from tightfit.describe.source import describe
from tightfit.formats.notes import kernel_notes
from tightfit.runtime.build import Built, build
from tightfit.runtime.generate import Sampling, generate
from tightfit.runtime.process import keep_heap_tight, keep_quiet
from tightfit.runtime.tokens import Prompt
from tightfit.terms.errors import TightfitError
from tightfit.terms.report import Report


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ram", required=True)
    parser.add_argument("--disk", default="100GiB")
    parser.add_argument("--quality", default="exact")
    parser.add_argument("--technique", action="append", default=[])
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--warm-up", action="store_true", help="two short passes first, so that lazy set-up is not timed")
    return parser.parse_args()


def resting_bits(built: Built) -> float:
    """Bits that a weight takes where it rests, embeddings and head included."""
    parameters = sum(parameter.numel() for parameter in built.skeleton.meta_model().parameters())
    return 8 * sum(resting_bytes(built.skeleton, built.plan.techniques)) / parameters


def figures(report: Report, built: Built) -> dict[str, Any]:
    """The fields that a peer's result has too, and what the plan said of them."""
    plan, seconds = report.plan, report.seconds
    return {
        "seconds_per_token": seconds["per_token"],
        "decode_tokens_per_second": 1 / seconds["per_token"],
        "prefill_seconds": seconds["first_token"],
        "prefill_tokens_per_second": plan.workload.tokens / seconds["first_token"],
        "prompt_tokens": plan.workload.tokens,
        "tokens": report.tokens,
        "load_seconds": seconds["load"],
        "seconds_waited": seconds["waited"],
        "process_peak_bytes": max(report.process["load_peak"], report.process["run_peak"]),
        "load_peak_bytes": report.process["load_peak"],
        "run_peak_bytes": report.process["run_peak"],
        "predicted_process_bytes": plan.predicted_bytes("ram"),
        "predicted_peak_bytes": plan.tensor_bytes(),
        "measured_peak_bytes": report.measured_bytes,
        "predicted_seconds_per_token": plan.seconds["token"],
        "predicted_seconds": plan.seconds,
        "streamed_bytes_per_token": plan.streamed_bytes,
        "moved_bytes_per_pass": report.moved_bytes / report.tokens,
        "bits_per_weight": resting_bits(built),
        "techniques": {name: dict(values) for name, values in plan.techniques.items()},
        "resting": plan.resting(),
        "kernels": kernel_notes(built.model),
        "predicted": plan.predicted,
        "plan_digest": plan_digest(plan.to_json()),
        "warnings": report.warnings,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plan, build, write, and say how it went."""
    workload = tightfit.Workload("generate", 1, args.prompt_tokens, args.tokens)
    plan = tightfit.plan(args.model, workload, tightfit.Budget.parse(ram=args.ram, disk=args.disk), args.quality, args.technique)
    skeleton = describe(args.model)
    vocabulary = skeleton.config.get_text_config().vocab_size
    with build(plan, skeleton) as built:
        if args.warm_up:
            greedy_decode(built.model, prompt_ids(2, vocabulary), 2)
        prompt = Prompt(torch.tensor([prompt_ids(args.prompt_tokens, vocabulary)]))
        report = generate(built, prompt, Sampling(ignore_eos=True))
        return figures(report, built) | memory_now() | {"disk_read_bytes": disk_read_bytes()}


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
