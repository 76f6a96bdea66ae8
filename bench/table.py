"""Table: docs/benchmarks.md from every results/*.json, and the figure of fits_as_promised where matplotlib is installed.

python bench/table.py            write the page (and the figure)
python bench/table.py --check    fail when the page is not what the results say
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import ABSENT, Results, percent, table, times, told, yes
from kernel_tables import kernels
from placement_tables import placement
from quantize_tables import quantize_quality
from solver_tables import quantize_speed
from tune_tables import bigger_steps, gpu_steps, tune_memory, tune_quality

from tightfit.terms.units import show_bytes, show_seconds

BENCH = Path(__file__).resolve().parent
PAGE = BENCH.parent / "docs" / "benchmarks.md"
FIGURE = BENCH.parent / "docs" / "figures" / "fits_as_promised.png"
INTRO = """# Benchmarks

Generated from `bench/*/results/*.json` by `python bench/table.py`; please do not edit. Each figure is in the file that its table links
to, with the machine, the versions, the load at the start and the plan's digest. Weights are random, which is right for memory and speed.
"""


def results_of(question: str) -> Results:
    """The results of a question by file name; empty where there are none."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((BENCH / question / "results").glob("*.json"))}


def fits_as_promised(results: Results) -> str:
    """Predicted against measured peaks."""
    result = results.get("cpu")
    if result is None:
        return ABSENT
    found, rows = result["summary"], [row for row in result["rows"] if "error" in row]
    failed = f" {found['failed']} rows failed." if found["failed"] else ""
    lines = [
        f"{len(rows)} runs: the promise was off by {found['median_error']:.2%} in the median and by {found['worst_error']:.2%} at worst; "
        f"{found['over_budget']} went over their budget. Of {found['under_kernel_limit']} in a memory cgroup of just their budget, "
        f"{found['finished_under_kernel_limit']} finished.{failed}",
        "",
        _loading(rows),
        "",
        "The budget of a row is the least in which the plan promises it. *Off*: promised over measured tensor bytes, by the CPU "
        "allocator's own records. *Process*: the kernel's count for the whole process.",
        "",
    ]
    if FIGURE.exists():
        lines += ["![promised against measured bytes](figures/fits_as_promised.png)", ""]
    body = table("family|model and work|promised:|measured:|off:|process:|budget:|kept|cgroup", (_fits_row(row) for row in rows))
    return "\n".join([*lines, body, "", told(result["machine"], "fits_as_promised", "cpu")])


def _loading(rows: list[dict[str, Any]]) -> str:
    """How the peak of loading compares with its promise. An upper bound is wished for: less is loaded at once than is promised."""
    errors = sorted(row["load_error"] for row in rows)
    below = [row for row in rows if row["load_error"] < -0.01]
    higher = sum(row["measured_load_bytes"] > row["predicted_peak_bytes"] for row in below)
    return (
        f"Loading: the promise was off by {errors[len(errors) // 2]:+.2%} in the median, from {errors[0]:+.0%} to {errors[-1]:+.0%}. In "
        f"{len(below)} rows more was held when loading ended than is promised for it: the slots of the stream, which the plan counts to "
        f"running; in {higher} of them that was more than running's promise."
    )


def _fits_row(row: dict[str, Any]) -> list[str]:
    limit = {None: "", True: "finished", False: "**stopped**"}[row.get("kernel_limit", {}).get("finished")]
    process = show_bytes(row["process_peak_bytes"]) if row["process_peak_bytes"] else "stopped"
    promised, measured = show_bytes(row["predicted_peak_bytes"]), show_bytes(row["measured_peak_bytes"])
    over = yes(not row["over_budget"])
    return [row["family"], row["name"], promised, measured, percent(row["error"], 2), process, show_bytes(row["budget_bytes"]), over, limit]


def bigger_than_memory(results: Results) -> str:
    """Streaming beside its floor and beside others."""
    titles = {"a": "2.2 GB exact in 1.2 GiB", "b": "2.2 GB near in 1.5 GiB", "c": "4 GB at 8 bits in 2.5 GiB"}
    rows, sources = [], []
    for part, title in titles.items():
        result = results.get(part)
        if result is None or not result["summary"].get("pairs"):
            rows.append([f"({part}) {title}", ABSENT, *[""] * 6])
            continue
        found, limit = result["summary"], result["runs"][0]["cgroup"]["limit_bytes"]
        rows.append(
            [
                f"({part}) {title}",
                f"{show_seconds(found['seconds_per_token'])} ({show_seconds(found['predicted_seconds_per_token'])})",
                times(found["over_floor"]),
                f"{result['settings']['peer']}: {show_seconds(found['peer_seconds_per_token'])}",
                times(found["speedup"]),
                f"{show_bytes(int(found['process_peak_bytes']))} of {show_bytes(limit)}",
                str(found["pairs"]),
                yes(found["kept"]),
            ]
        )
        sources.append(told(result["machine"], "bigger_than_memory", part))
    intro = (
        "Cold page cache, a memory cgroup whose limit is the budget, A B A B, medians of ratios. *Floor*: bytes that must be read for a "
        "token over the fastest direct reads seen in the job, by passes before and after each run or by the runs themselves."
    )
    body = table("case|ours a token (planned)|over the floor:|peer a token|faster:|process|pairs:|as wished", rows)
    return "\n\n".join([intro, body, *bigger_steps(results), *sources])


def resident_decode(results: Results) -> str:
    """Speeds when everything fits, and where ours goes."""
    result = results.get("cpu")
    if result is None:
        return ABSENT
    rows = [
        [
            row["side"],
            str(row["bits"]),
            *(f"{row[name]:.1f}" for name in ("prefill_tokens_per_second", "decode_tokens_per_second")),
            str(row["runs"]),
        ]
        if row["runs"]
        else [row["side"], str(row["bits"]), ABSENT, ABSENT, "0"]
        for row in result["rows"]
    ]
    shares = [
        [side, *(f"{found['share'][kind]:.0%}" for kind in ("linear", "attention", "other", "python"))]
        for side, found in result["where"].items()
        if "share" in found
    ]
    settings = result["settings"]
    work = f"{settings['shape']}, {settings['prompt_tokens']} tokens of prompt, one sequence"
    intro = f"{work}, {settings['threads']} thread(s). There is no bar here: this shows the gap."
    parts = [intro, table("side|bits:|read, tokens/s:|written, tokens/s:|runs:", rows)]
    parts += [table("where our time of a written token goes|linear:|attention:|other operators:|Python:", shares)] if shares else []
    return "\n\n".join([*parts, told(result["machine"], "resident_decode", "cpu")])


def plan_speed(results: Results) -> str:
    """How long planning takes."""
    result = results.get("cpu")
    if result is None:
        return ABSENT
    rows = [
        [
            f"`tightfit plan {' '.join(row['arguments'])} --json`",
            show_seconds(row["median_seconds"]),
            show_bytes(row["peak_bytes"]),
            yes(row["kept"]),
        ]
        if not row["fault"]
        else [f"`tightfit plan {' '.join(row['arguments'])} --json`", "failed", "-", yes(False)]
        for row in result["rows"]
    ]
    limits = result["limits"]
    header = f"command|wall:|process:|within {limits['most_seconds']:.0f} s and {show_bytes(limits['most_rss_bytes'])}"
    return "\n\n".join([table(header, rows), told(result["machine"], "plan_speed", "cpu")])


def gpu(results: Results) -> str:
    """The promises on a GPU."""
    rows, sources = [], []
    for name in ("llama-8b-exact", "llama-8b-accelerate", "cpm-2-11b-int8", "cpm-2-11b-accelerate", "llama-70b-nf4"):
        result = results.get(name, {}).get("result", {})
        if "seconds_per_token" not in result:
            rows.append([name, ABSENT, *[""] * 5])
            continue
        settings = results[name]["settings"]
        promised = [show_bytes(result["predicted_peak_bytes"]), percent(result["deviation"], 2)] if "deviation" in result else ["-", "-"]
        reserved = show_bytes(result["reserved_peak_bytes"] if "deviation" in result else result["reserved_bytes"])
        rows.append(
            [name, settings["gpu"], *promised, reserved, show_seconds(result["seconds_per_token"]), times(result.get("over_floor"))]
        )
        sources.append(told(results[name]["machine"], "gpu", name))
    return "\n\n".join([table("job|budget:|promised:|off:|reserved:|a token:|over the floor:", rows), *gpu_steps(results), *sources])


QUESTIONS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "fits_as_promised": ("Does it say so before, and stay inside?", fits_as_promised),
    "bigger_than_memory": ("How fast is a model that does not fit?", bigger_than_memory),
    "tune_memory": ("What does a training step take?", tune_memory),
    "resident_decode": ("How fast is it when everything fits?", resident_decode),
    "plan_speed": ("How long does a plan take?", plan_speed),
    "gpu": ("And on a GPU?", gpu),
    "tune_quality": ("How good is what was tuned?", tune_quality),
    "kernels": ("How fast are products with few-bit weights?", kernels),
    "quantize_quality": ("How good are few-bit weights?", quantize_quality),
    "quantize_speed": ("How fast are weights brought into few bits?", quantize_speed),
    "placement": ("Which device for which operator?", placement),
}


def page() -> str:
    """The whole page."""
    sections = [f"## {title}\n\n`bench/{question}`\n\n{show(results_of(question))}\n" for question, (title, show) in QUESTIONS.items()]
    return "\n".join([INTRO, *sections])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.check:
        if PAGE.exists() and PAGE.read_text() == page():
            return 0
        print(f"error: `{PAGE.relative_to(BENCH.parent)}` is not what the results say\n\nhint: python bench/table.py", file=sys.stderr)
        return 1
    try:
        from figure import draw

        draw(results_of("fits_as_promised").get("cpu", {}).get("rows", []), FIGURE)
    except ImportError:
        print("no matplotlib: the figure stays as it is", file=sys.stderr)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
