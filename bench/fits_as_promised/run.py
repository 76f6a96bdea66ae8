"""fits_as_promised: predicted against measured peaks over families, tasks, techniques and lengths; was any budget broken?

python bench/fits_as_promised/run.py [--missing] [--only TEXT] [--lanes N]      (about 25 minutes at one thread, two rows at a time)

Each row runs twice, in processes of its own: under the CPU allocator's records (an independent witness of tensor bytes), and by
itself (the process's peak by the kernel's count, beside its budget). Some run a third time in a memory cgroup of their budget.
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))
from cgroup import JOIN, CgroupUnavailable, memory_cgroup
from record import cache_folder, ensure_probed, machine_facts, read_result, run_child, say, write_result

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "cpu.json"
Row = dict[str, Any]


def rows_of(settings: Mapping[str, Any]) -> dict[str, Row]:
    """Every row by name, with the defaults filled in."""
    rows = {}
    for given in settings["rows"]:
        row = settings["defaults"] | given
        shape = settings["shapes"].get(row["model"])
        row["family"] = shape["family"] if shape else settings["presets"][row["model"]]
        row["shape"] = {name: value for name, value in (shape or {}).items() if name != "family"}
        rows[_name(row)] = row
    assert len(rows) == len(settings["rows"]), "two rows are the same"
    return rows


def _name(row: Row) -> str:
    how = row["techniques"] + ([f"offload({row['resident']:.0%} resident)"] if row["resident"] != 1 else [])
    written = f"+{row['new_tokens']}" if row["task"] == "generate" else ""
    return f"{row['model']} {row['task']} {row['batch']}x{row['tokens']}{written} {'+'.join(how) or 'none'}"


def prepare_shape(shape: Row, threads: int) -> str:
    """The folder of a shape of the settings, with weights; made once for each version of its config."""
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:10]
    folder = cache_folder() / "shapes" / f"{shape['model_type']}-{digest}"
    if not folder.exists():
        say(f"writing {folder}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        config = folder.with_suffix(".json")
        config.write_text(json.dumps(shape))
        made = run_child([sys.executable, str(HERE / "shapes.py"), str(config), str(folder)], threads, 300)
        if "error" in made:
            raise SystemExit(f"error: cannot write the shape: {made['error']}")
    return str(folder)


def run_row(name: str, row: Row, folders: Mapping[str, str], settings: Mapping[str, Any]) -> Row:
    """Both runs of a row, and the third under a kernel limit where the row asks for it."""
    began = time.monotonic()
    job = {key: row[key] for key in ("task", "batch", "tokens", "new_tokens", "techniques", "resident")}
    job |= {"model": folders.get(row["model"], row["model"]), "random_weights": not row["shape"] and row["model"] != "tightfit-demo"}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        command = [sys.executable, str(HERE / "one.py"), file.name]

        def child(way: str, *before: str) -> Row:
            return run_child([*before, *command, way], settings["threads"], settings["timeout_seconds"])

        result = child("allocator")
        if "error" not in result:
            alone = child("process")
            result["error"] = result["predicted_peak_bytes"] / result["measured_peak_bytes"] - 1
            result["load_error"] = result["predicted_load_bytes"] / result["measured_load_bytes"] - 1
            result["fault"] = alone.get("error", "")
            result["process_peak_bytes"] = alone.get("process_peak_bytes")
            result["over_budget"] = bool(result["fault"]) or result["process_peak_bytes"] > result["budget_bytes"]
            if row["under_kernel_limit"]:
                result["kernel_limit"] = under_limit(result["budget_bytes"], child)
        else:
            result["fault"] = result.pop("error")
    result = row | {"name": name} | result | {"wall_seconds": round(time.monotonic() - began, 1)}
    result.pop("shape")
    result.pop("phases", None)
    say(_line(result))
    return result


def under_limit(budget_bytes: int, child: Any) -> Row:
    """Run once more in a memory cgroup whose limit is the budget; a group that breaks it is killed by the kernel."""
    try:
        with memory_cgroup(budget_bytes) as group:
            found = child("process", "/bin/sh", "-c", JOIN, str(group / "cgroup.procs"))
            peak = int((group / "memory.max_usage_in_bytes").read_text())
    except CgroupUnavailable as reason:
        return {"skipped": str(reason)}
    return {"limit_bytes": budget_bytes, "peak_bytes": peak, "finished": "error" not in found, "fault": found.get("error", "")}


def _line(row: Row) -> str:
    if "error" not in row:
        return f"FAILED {row['name']}: {row['fault']} {row.get('details', '')}"
    finished = row.get("kernel_limit", {}).get("finished")
    limit = {None: "", True: "; finished under the kernel's limit", False: "; STOPPED at the kernel's limit"}[finished]
    share = row["fault"] or f"{row['process_peak_bytes'] / row['budget_bytes']:.1%} of budget"
    over = " OVER BUDGET" if row["over_budget"] else ""
    return f"{row['error']:+7.2%}  {row['name']}: {share}{over}{limit} ({row['wall_seconds']:.0f} s)"


def summary(rows: list[Row]) -> Row:
    """What the question asks: the median and the worst error, and how many budgets were broken."""
    done = [row for row in rows if "error" in row]
    errors = sorted(abs(row["error"]) for row in done)
    limited = [row["kernel_limit"] for row in done if row.get("kernel_limit", {}).get("finished") is not None]
    return {
        "rows": len(rows),
        "failed": len(rows) - len(done),
        "median_error": statistics.median(errors) if errors else None,
        "worst_error": errors[-1] if errors else None,
        "over_budget": sum(row["over_budget"] for row in done),
        "under_kernel_limit": len(limited),
        "finished_under_kernel_limit": sum(limit["finished"] for limit in limited),
        "fullest_budget": max((row["process_peak_bytes"] / row["budget_bytes"] for row in done if row["process_peak_bytes"]), default=None),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", action="store_true", help="keep rows that have a result, run the others")
    parser.add_argument("--only", default="", help="run rows whose name holds this text; keep the results of the others")
    parser.add_argument("--lanes", type=int, help="rows at a time")
    args = parser.parse_args()
    settings = tomllib.loads((HERE / "settings.toml").read_text())
    facts = machine_facts(settings["threads"])
    facts["probed"] = ensure_probed(settings["threads"])
    rows, before = rows_of(settings), {row["name"]: row for row in read_result(RESULT).get("rows", [])}
    kept = {name for name in rows if name in before and ((args.missing and not before[name]["fault"]) or args.only not in name)}
    wanted = [name for name in rows if name not in kept and args.only in name]
    folders = {rows[name]["model"]: prepare_shape(rows[name]["shape"], settings["threads"]) for name in wanted if rows[name]["shape"]}
    done = {name: before[name] for name in kept}

    def write() -> Row:
        results = [done[name] for name in rows if name in done]
        found = summary(results)
        write_result(RESULT, {"question": "fits_as_promised", "machine": facts, "summary": found, "rows": results})
        return found

    with ThreadPoolExecutor(args.lanes or settings["lanes"]) as lanes:
        for future in as_completed([lanes.submit(run_row, name, rows[name], folders, settings) for name in wanted]):
            done[future.result()["name"]] = future.result()
            write()
    print(json.dumps(write()))


if __name__ == "__main__":
    main()
