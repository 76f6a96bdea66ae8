"""quantize_speed: weights a second and peak bytes of every solver, the search over ranges beside the paper's loop, hours of large models.

python bench/quantize_speed/run.py [--device cpu|cuda] [--only WORDS] [--missing] [--fresh] [--results FOLDER] [--dry]

Rows are `solve SHAPE SOLVER`, `peak SHAPE SOLVER`, `search GROUP` and, with `--device cuda`, `block MODEL` (first; about eight minutes).
What is in results/DEVICE.json already is not run again; `--missing` says what is still to run. On a CPU at most ten minutes at one
thread. A CPU's seconds are told twice, by the wall and by the thread's own clock; shares are of the latter. `--dry` runs all of it, the
blocks too, at a toy's size, and keeps nothing.
"""

import argparse
import json
import os
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from layers import peak_row, solve_row, warm_up
from record import CHECKOUT, machine_facts, read_result, run_child, say, write_result
from search import search_row

HERE = Path(__file__).resolve().parent
Settings = dict[str, Any]
Row = dict[str, Any]
Jobs = dict[str, tuple[Row, Callable[[], Row]]]
"""By name: what a row is about, and how it is measured."""


def jobs_of(settings: Settings, device: str, dry: bool) -> Jobs:
    """All rows in their order: blocks first, since a GPU's time is lent."""
    jobs: Jobs = {}
    if device != "cpu" or dry:
        for model in settings["blocks"]["models"]:
            jobs[f"block {model}"] = ({"kind": "block", "model": model}, lambda model=model: block_row(settings, model, device, dry))
    for group in settings["search"]["groups"]:
        about = {"kind": "search", "group": group, "candidates": (settings["search"]["steps"] // 2) ** 2}
        jobs[f"search {group or 'row'}"] = (about, lambda group=group: search_row(group, settings["search"], device))
    for layer in settings["layers"]:
        rows, columns = layer["rows"], layer["columns"]
        solved = layer["solved"] if device == "cpu" else rows
        for solver in settings["solvers"]:
            about = {"kind": "solve", "solver": solver, "rows": rows, "columns": columns}
            made = (lambda *given: lambda: solve_row(*given, device))(solver, rows, columns, solved)
            jobs[f"solve {rows}x{columns} {solver}"] = (about, made)
    for layer in settings["peaks"]["layers"]:
        rows, columns = layer["rows"], layer["columns"]
        for solver in settings["peaks"]["solvers"]:
            about = {"kind": "peak", "solver": solver, "rows": rows, "columns": columns}
            made = (lambda *given: lambda: peak_row(*given, device))(solver, rows, columns)
            jobs[f"peak {rows}x{columns} {solver}"] = (about, made)
    return jobs


def block_row(settings: Settings, model: str, device: str, dry: bool) -> Row:
    """One block in a process of its own, whose allocator is capped."""
    from tightfit import catalog

    part = settings["blocks"]
    technique, chosen = catalog.parse(part["technique"])
    job = {name: part[name] for name in ("samples", "tokens", "gpu", "ram", "disk")}
    job |= {"model": model, "technique": technique, "settings": chosen, "device": device, "dry": dry, "threads": settings["threads"]}
    kept = {"TIGHTFIT_HOME": os.environ["TIGHTFIT_HOME"]} if "TIGHTFIT_HOME" in os.environ else {}
    kept["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT / "src"), os.environ.get("PYTHONPATH", "")])  # packages of whoever started this
    found = run_child([sys.executable, str(HERE / "blocks.py"), json.dumps(job)], settings["threads"], part["limit_seconds"], **kept)
    if "error" in found:
        return found
    most = part["most_hours"].get(model)
    return found | {"most_hours": most, "kept": None if most is None else found["hours"] <= most}


def dried(settings: Settings) -> Settings:
    """Settings under which every row takes a moment."""
    small = settings.pop("dry")
    settings["peaks"]["layers"], settings["layers"] = small["peaks"], small["layers"]
    settings["search"] |= small["search"]
    settings["blocks"] |= small["blocks"]
    return settings


def told(row: Row) -> str:
    """What a person wants to see while it runs."""
    if "error" in row:
        return row["error"]
    if row["kind"] == "solve":
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["share"].items() if share > 0.005)
        return f"{row['million_weights_per_second']:.3f} M/s ({row['million_weights_per_busy_second']:.3f} by its own clock): {shares}"
    if row["kind"] == "peak":
        return f"{row['beyond_bytes'] / 2**20:.0f} MiB, promised {row['promised_bytes'] / 2**20:.0f}"
    if row["kind"] == "search":
        return f"{row['seconds']:.2f} s, {row['speedup']:.0f} times as fast, error {row['error_over_least']:.4f} of the least"
    return f"{row['seconds_per_block']:.1f} s a block, {row['hours']:.2f} h, {row['peak_bytes'] / 2**30:.1f} GiB"


def asked(name: str, only: str) -> bool:
    """Whether all words of `--only`, with `;` between them, are words of the row's name."""
    return all(word in name.split() for word in filter(None, only.split(";")))


def run(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The rows that are asked for and not there yet, each written as soon as it is done."""
    file = args.results / f"{args.device}.json"
    before = {} if args.fresh or args.dry else read_result(file)
    facts = before.get("machine") or machine_facts(settings["threads"]) | gpu_facts(args.device)
    rows = {name: row for name, row in before.get("rows", {}).items() if "error" not in row}
    warm = False
    for name, (about, measure) in jobs_of(settings, args.device, args.dry).items():
        if name in rows or not asked(name, args.only):
            continue
        if about["kind"] in ("solve", "search") and not warm:
            warm_up(args.device)
            warm = True
        rows[name] = about | measure()
        say(f"{name}: {told(rows[name])}")
        if not args.dry:
            write_result(file, {"question": "quantize_speed", "machine": facts, "settings": settings, "rows": rows})
    return rows


def gpu_facts(device: str) -> dict[str, Any]:
    """The card, as torch sees it."""
    if device == "cpu":
        return {}
    card = torch.cuda.get_device_properties(0)
    return {"gpu": card.name, "gpu_bytes": card.total_memory, "cuda": torch.version.cuda}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", default="", help="words of a row's name, with `;` between: `search`, `block;llama-2-70b`")
    parser.add_argument("--missing", action="store_true", help="say what is still to run")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    settings = tomllib.loads((HERE / "settings.toml").read_text())
    settings = dried(settings) if args.dry else settings
    if args.device != "cpu":
        settings["threads"] = len(os.sched_getaffinity(0))
    torch.set_num_threads(settings["threads"])
    if args.missing:
        done = read_result(args.results / f"{args.device}.json").get("rows", {})
        print("\n".join(name for name in jobs_of(settings, args.device, args.dry) if name not in done and asked(name, args.only)))
        return
    with torch.inference_mode():
        rows = run(args, settings)
    print(json.dumps({name: {key: row[key] for key in ("kept", "error") if key in row} for name, row in rows.items()}))


if __name__ == "__main__":
    main()
