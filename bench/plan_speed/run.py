"""plan_speed: wall seconds and peak memory of `tightfit plan MODEL … --json` as users run it, offline.

python bench/plan_speed/run.py [--runs N] [--only TEXT]      (about two minutes)
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import child_environment, ensure_probed, last_json, machine_facts, plan_digest, read_result, say, write_result

from tightfit.terms.units import parse_size

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "cpu.json"


def plan_once(arguments: list[str], threads: int) -> dict[str, Any]:
    """One plan in its own process: seconds from start to exit, peak of the process, and the plan."""
    command = [sys.executable, "-m", "tightfit", "plan", *arguments, "--json"]
    began = time.perf_counter()
    with subprocess.Popen(command, env=child_environment(threads), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, err = process.communicate()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "plan": last_json(out), "stderr": err.strip(), "returncode": process.returncode}


def peak_bytes(arguments: list[str], threads: int) -> int:
    """The process's peak by the kernel's count, in a child of its own: `ru_maxrss` of children is the largest of all so far."""
    script = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)"
    script += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    command = [sys.executable, "-c", script, sys.executable, "-m", "tightfit", "plan", *arguments, "--json"]
    return int(subprocess.run(command, env=child_environment(threads), capture_output=True, text=True, check=True).stdout)


def measure(name: str, arguments: list[str], settings: dict[str, Any], runs: int) -> dict[str, Any]:
    """Several plans, and the peak of one more."""
    found = [plan_once(arguments, settings["threads"]) for _ in range(runs)]
    plan = found[-1]["plan"]
    if plan is None:
        say(f"FAILED {name}: {found[-1]['stderr'][-300:]}")
        return {"name": name, "arguments": arguments, "fault": found[-1]["stderr"][-300:]}
    seconds = [run["seconds"] for run in found]
    row = {
        "name": name,
        "arguments": arguments,
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "peak_bytes": peak_bytes(arguments, settings["threads"]),
        "plan_digest": plan_digest(plan),
        "techniques": list(plan["techniques"]),
        "resting": plan["resting"],
        "predicted_bytes": plan["predicted_bytes"],
        "fault": "",
    }
    row["kept"] = row["median_seconds"] <= settings["most_seconds"] and row["peak_bytes"] <= parse_size(settings["most_rss"])
    say(f"{row['median_seconds']:6.1f} s  {row['peak_bytes'] / 2**20:6.0f} MiB  {name}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int)
    parser.add_argument("--only", default="", help="plans whose name holds this text; the results of the others are kept")
    args = parser.parse_args()
    settings = tomllib.loads((HERE / "settings.toml").read_text())
    facts = machine_facts(settings["threads"]) | {"probed": ensure_probed(settings["threads"])}
    before = {row["name"]: row for row in read_result(RESULT).get("rows", [])}
    rows = []
    for name, arguments in settings["plans"].items():
        if args.only in name:
            rows.append(measure(name, arguments, settings, args.runs or settings["runs"]))
        elif name in before:
            rows.append(before[name])
    limits = {"most_seconds": settings["most_seconds"], "most_rss_bytes": parse_size(settings["most_rss"])}
    write_result(RESULT, {"question": "plan_speed", "machine": facts, "limits": limits, "rows": rows})
    print(json.dumps({row["name"]: [row.get("median_seconds"), row.get("peak_bytes"), row.get("kept")] for row in rows}))


if __name__ == "__main__":
    main()
