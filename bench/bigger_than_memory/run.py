"""bigger_than_memory: seconds per token of a model that does not fit, beside its floor and beside others under the same kernel limit.

python bench/bigger_than_memory/run.py --part a|b|c [--pairs N] [--fresh] [--models FOLDER] [--llama-cpp FOLDER]

Ours and the peer take turns (A B A B), each in a memory cgroup whose limit is the budget, each with a cold page cache. The floor
is the bytes that must be read for a token over the fastest direct reads seen in the whole job: of passes over the model's own file,
right before and right after each of our runs, and of the runs themselves. A shared disk swings; a slow pass would flatter us.
Results are written after every run; a part that was interrupted goes on where it stopped. Needs root, for cgroups and for dropping
the page cache, and a quiet machine.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))
from cgroup import drop_page_cache, run_limited, unavailable_reason
from models import LLAMA_CPP, MODELS, PEERS, ensure_gguf, ensure_model
from record import child_environment, ensure_probed, machine_facts, read_result, say, write_result

from tightfit.runtime.probe import read_bandwidth
from tightfit.terms.units import parse_size

HERE = Path(__file__).resolve().parent
MEDIANS = ("seconds_per_token", "predicted_seconds_per_token", "process_peak_bytes", "predicted_process_bytes", "prefill_seconds")
DISK_PASSES, DISK_BYTES = 6, 1 << 30
Part = dict[str, Any]


def parse_arguments(parts: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=parts, required=True)
    parser.add_argument("--pairs", type=int, help="runs of each side in all, those of an earlier start included")
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs")
    parser.add_argument("--models", type=Path, default=MODELS, help="where model folders are, or are made")
    parser.add_argument("--llama-cpp", type=Path, default=LLAMA_CPP, help="what build_llama_cpp.sh made")
    return parser.parse_args()


def our_command(part: Part, model: Path) -> list[str]:
    """The command that runs tightfit."""
    command = [sys.executable, str(HERE / "ours.py"), "--model", str(model), "--ram", part["ram"], "--quality", part["quality"]]
    for technique in part["techniques"]:
        command += ["--technique", technique]
    return [*command, "--prompt-tokens", str(part["prompt_tokens"]), "--tokens", str(part["tokens"])]


def peer_command(part: Part, model: Path, args: argparse.Namespace, offload: str) -> list[str]:
    """The command that runs the peer."""
    tokens, threads = str(part.get("peer_tokens", part["tokens"])), str(part["threads"])
    shared = ["--tokens", tokens, "--threads", threads, "--prompt-tokens", str(part["prompt_tokens"])]
    if part["peer"] == "accelerate":
        limit = str(parse_size(part["ram"]))
        script = [str(PEERS / "accelerate_run.py"), "--model", str(model)]
        return [sys.executable, *script, "--ram-bytes", limit, "--offload-folder", offload, *shared]
    file = ensure_gguf(part["shape"], part["gguf"], args.models, args.llama_cpp)
    return [sys.executable, str(PEERS / "llama_cpp_run.py"), "--model", str(file), "--build", str(args.llama_cpp), *shared]


def limited_run(command: list[str], part: Part) -> dict[str, Any]:
    """One cold run under the limit: the command's own figures, and the group's."""
    if reason := drop_page_cache():
        say(reason)
    done = run_limited(command, parse_size(part["ram"]), part["timeout_seconds"])
    result = done["result"] or {"error": f"ended with {done['returncode']}: {done['stderr'].strip()[-300:]}"}
    group = {name: value for name, value in done.items() if name not in ("command", "result", "stdout", "stderr")}
    return result | {"cgroup": group, "load_average": list(os.getloadavg())}


def our_run(part: Part, model: Path) -> dict[str, Any]:
    """One run of tightfit between two measurements of the disk."""
    file = max(model.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    before = cold_bandwidth(file)
    run = limited_run(our_command(part, model), part)
    return run | {"disk_bandwidth": [before, cold_bandwidth(file)]}


def cold_bandwidth(file: Path) -> float:
    """Bytes per second of direct reads of the model's own file, the fastest of some passes: a disk's host may have a cache of its own."""
    passes = []
    for _ in range(DISK_PASSES):
        drop_page_cache()
        passes.append(read_bandwidth(file, DISK_BYTES))
    return max(passes)


def summary(part: Part, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the pairs, against what the question asks."""
    sides = {side: [run for run in runs if run["side"] == side] for side in ("ours", "peer")}
    pairs = [(ours, peer) for ours, peer in zip(sides["ours"], sides["peer"], strict=False) if "error" not in ours and "error" not in peer]
    ours = [run for run in sides["ours"] if "error" not in run]
    found: dict[str, Any] = {"pairs": len(pairs), "faults": [run["error"] for run in runs if "error" in run]}
    if ours:
        for name in MEDIANS:
            found[name] = statistics.median(run[name] for run in ours)
        found["over_budget"] = sum(run["process_peak_bytes"] > run["cgroup"]["limit_bytes"] for run in ours)
        found |= over_floor(ours)
    if pairs:
        found["peer_seconds_per_token"] = statistics.median(peer["seconds_per_token"] for _, peer in pairs)
        found["speedup"] = statistics.median(peer["seconds_per_token"] / mine["seconds_per_token"] for mine, peer in pairs)
        floor_kept = found["over_floor"] is None or found["over_floor"] <= part.get("most_over_floor", float("inf"))
        found["kept"] = found["speedup"] >= part.get("least_speedup", 0) and floor_kept and not found["over_budget"]
    return found


def over_floor(ours: list[dict[str, Any]]) -> dict[str, Any]:
    """The floor by the fastest reads of the job, and how far above it a token took in the median; None where nothing streams."""
    streamed = ours[0]["streamed_bytes_per_token"]
    rates = [rate for run in ours for rate in (*run["disk_bandwidth"], streamed / run["seconds_per_token"])]
    floor = streamed / max(rates)
    found = {"disk_bandwidth": max(rates), "floor_seconds_per_token": floor}
    return found | {"over_floor": statistics.median(run["seconds_per_token"] for run in ours) / floor if streamed else None}


def run_part(name: str, part: Part, pairs: int, args: argparse.Namespace, result: dict[str, Any], file: Path) -> dict[str, Any]:
    """Take turns until there are `pairs` of both, writing the result after every run."""
    model = ensure_model(part["shape"], args.models)
    result["weight_bytes"] = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    while len(result["runs"]) < 2 * pairs:
        side = ("ours", "peer")[len(result["runs"]) % 2]
        with tempfile.TemporaryDirectory(dir=args.models, prefix="offload-") as offload:
            run = our_run(part, model) if side == "ours" else limited_run(peer_command(part, model, args, offload), part)
        result["runs"].append({"side": side, **run})
        result["summary"] = summary(part, result["runs"])
        if not name.startswith("dry"):
            write_result(file, result)
        pace = run.get("error") or f"{run['seconds_per_token']:.3f} s per token"
        say(f"{name} {len(result['runs'])}/{2 * pairs} {side}: {pace}, cgroup peak {run['cgroup']['peak_bytes'] / 2**20:.0f} MiB")
    return result


def main() -> None:
    settings = tomllib.loads((HERE / "settings.toml").read_text())
    args = parse_arguments(list(settings["parts"]))
    if reason := unavailable_reason():
        raise SystemExit(f"error: {reason}")
    shared = {name: value for name, value in settings.items() if name != "parts"}
    part, pairs = shared | settings["parts"][args.part], args.pairs or settings["pairs"]
    part.pop("pairs")
    args.models.mkdir(parents=True, exist_ok=True)
    facts = machine_facts(part["threads"]) | {"probed": ensure_probed(part["threads"])}
    os.environ.update(child_environment(part["threads"], TIGHTFIT_SPILL=str(args.models)))
    file = HERE / "results" / f"{args.part}.json"
    before = {} if args.fresh else read_result(file)
    fresh = {"question": "bigger_than_memory", "part": args.part, "machine": facts, "settings": part, "runs": [], "summary": {}}
    result = before if before.get("settings") == part else fresh
    result = run_part(args.part, part, pairs, args, result, file)
    print(json.dumps(result["summary"]))


if __name__ == "__main__":
    main()
