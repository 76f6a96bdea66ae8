"""Where the time of our decoding goes: kernels of the linear layers, other operators, and Python between them. One JSON line.

python where.py --model FOLDER [--technique NAME] --ram SIZE --tokens N

The pace is measured without the profiler; operators' own times with it, which stretches them a little, so Python's share is a
lower bound.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))
from peer_common import greedy_decode, prompt_ids
from torch.profiler import ProfilerActivity, profile

import tightfit
from tightfit.describe.source import describe
from tightfit.formats.notes import kernel_notes
from tightfit.runtime.build import build
from tightfit.runtime.process import keep_heap_tight, keep_quiet

PRODUCTS = ("mm", "addmm", "bmm", "linear", "gemm", "gemv", "pack", "mkldnn", "4bit", "tightfit::experts")
"""What the names of operators hold that multiply with weights; attention has its own names."""


def kind_of(name: str) -> str:
    """`linear`, `attention` or `other`."""
    if "attention" in name:
        return "attention"
    return "linear" if any(word in name for word in PRODUCTS) else "other"


def where(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a token by kind of operator, and the operators that take most."""
    techniques = [args.technique] if args.technique else []
    workload = tightfit.Workload("generate", 1, 8, 2 * args.tokens)
    plan = tightfit.plan(args.model, workload, tightfit.Budget.parse(ram=args.ram), "exact", techniques)
    with build(plan, describe(args.model)) as built:
        prompt = prompt_ids(8, built.model.config.vocab_size)
        greedy_decode(built.model, prompt, 3)
        _, plain, _ = greedy_decode(built.model, prompt, args.tokens)
        with profile(activities=[ProfilerActivity.CPU]) as record:
            _, profiled, _ = greedy_decode(built.model, prompt[:1], args.tokens)
        seconds, passes = statistics.median(plain), args.tokens
        events = sorted(record.key_averages(), key=lambda event: -event.self_cpu_time_total)
        spent = {"linear": 0.0, "attention": 0.0, "other": 0.0}
        for event in events:
            spent[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / passes
        operators = [
            {"name": event.key, "calls_per_token": event.count / passes, "seconds_per_token": event.self_cpu_time_total / 1e6 / passes}
            for event in events[:12]
        ]
        return {
            "seconds_per_token": seconds,
            "profiled_seconds_per_token": statistics.median(profiled),
            "share": {kind: value / seconds for kind, value in spent.items()} | {"python": max(0.0, 1 - sum(spent.values()) / seconds)},
            "operators": operators,
            "kernels": kernel_notes(built.model),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--technique", default="")
    parser.add_argument("--ram", default="8GiB")
    parser.add_argument("--tokens", type=int, default=16)
    keep_quiet()
    keep_heap_tight()
    print(json.dumps(where(parser.parse_args())))


if __name__ == "__main__":
    main()
