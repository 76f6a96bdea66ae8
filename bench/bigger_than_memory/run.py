"""bigger_than_memory: seconds per token of a model that does not fit, beside its floor and beside others under the same kernel limit.

python bench/bigger_than_memory/run.py --part a|b|c|d-… [--pairs N] [--fresh] [--models FOLDER] [--llama-cpp FOLDER] [--soup FOLDER]

The parts d are training steps, so their unit is the step; a peer there may be without a limit, where it cannot run inside one.

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
from record import cache_folder, child_environment, ensure_probed, machine_facts, read_result, say, write_result

from tightfit.runtime.probe import read_bandwidth
from tightfit.terms.units import parse_size

HERE = Path(__file__).resolve().parent
MEDIANS = {
    "token": ("seconds_per_token", "predicted_seconds_per_token", "process_peak_bytes", "predicted_process_bytes", "prefill_seconds"),
    "step": ("seconds_per_step", "predicted_seconds_per_step", "process_peak_bytes", "predicted_process_bytes", "micro_batch"),
}
DISK_PASSES, DISK_BYTES = 6, 1 << 30
Part = dict[str, Any]


def parse_arguments(parts: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=parts, required=True)
    parser.add_argument("--pairs", type=int, help="runs of each side in all, those of an earlier start included")
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs")
    parser.add_argument("--models", type=Path, default=MODELS, help="where model folders are, or are made")
    parser.add_argument("--llama-cpp", type=Path, default=LLAMA_CPP, help="what build_llama_cpp.sh made")
    parser.add_argument("--soup", type=Path, default=cache_folder() / "soup", help="a virtual environment with `soup-cli[train]` in it")
    return parser.parse_args()


def unit_of(part: Part) -> str:
    """What is timed: a written `token` or a training `step`."""
    return part.get("unit", "token")


def step_arguments(part: Part) -> list[str]:
    """How much work a training step is, and how many are taken: the same for everybody."""
    numbers = {"--batch": part["batch"], "--tokens": part["length"], "--steps": part["steps"], "--warm-up": part["warm_up"]}
    return [text for flag, value in numbers.items() for text in (flag, str(value))]


def our_command(part: Part, model: Path) -> list[str]:
    """The command that runs tightfit."""
    asked = [text for technique in part["techniques"] for text in ("--technique", technique)]
    if unit_of(part) == "step":
        return [sys.executable, str(HERE / "tune.py"), "--model", str(model), "--ram", part["ram"], *asked, *step_arguments(part)]
    command = [sys.executable, str(HERE / "ours.py"), "--model", str(model), "--ram", part["ram"], "--quality", part["quality"], *asked]
    return [*command, "--prompt-tokens", str(part["prompt_tokens"]), "--tokens", str(part["tokens"])]


def peer_command(part: Part, model: Path, args: argparse.Namespace, offload: str) -> list[str]:
    """The command that runs the peer."""
    if part["peer"] == "PEFT":
        script = [str(PEERS / "tune_peft.py"), "--model", str(model), "--threads", str(part["threads"]), *part["peer_arguments"]]
        return [sys.executable, *script, *step_arguments(part)]
    if part["peer"] == "Soup":
        place = ["--model", str(model), "--threads", str(part["threads"]), "--folder", offload, "--soup", str(args.soup)]
        return [sys.executable, str(PEERS / "tune_soup.py"), *place, *part["peer_arguments"], *step_arguments(part)]
    tokens, threads = str(part.get("peer_tokens", part["tokens"])), str(part["threads"])
    shared = ["--tokens", tokens, "--threads", threads, "--prompt-tokens", str(part["prompt_tokens"])]
    if part["peer"] == "accelerate":
        limit = str(parse_size(part["ram"]))
        script = [str(PEERS / "accelerate_run.py"), "--model", str(model)]
        return [sys.executable, *script, "--ram-bytes", limit, "--offload-folder", offload, *shared]
    file = ensure_gguf(part["shape"], part["gguf"], args.models, args.llama_cpp)
    return [sys.executable, str(PEERS / "llama_cpp_run.py"), "--model", str(file), "--build", str(args.llama_cpp), *shared]


def limited_run(command: list[str], part: Part, limit_bytes: int | None) -> dict[str, Any]:
    """One cold run under the limit, where there is one: the command's own figures, and the group's."""
    if reason := drop_page_cache():
        say(reason)
    done = run_limited(command, limit_bytes, part["timeout_seconds"])
    result = done["result"] or {"error": f"ended with {done['returncode']}: {done['stderr'].strip()[-300:]}"}
    group = {name: value for name, value in done.items() if name not in ("command", "result", "stdout", "stderr")}
    return result | {"cgroup": group, "load_average": list(os.getloadavg())}


def our_run(part: Part, model: Path) -> dict[str, Any]:
    """One run of tightfit between two measurements of the disk."""
    file = max(model.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    before = cold_bandwidth(file)
    run = limited_run(our_command(part, model), part, parse_size(part["ram"]))
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
    unit = unit_of(part)
    sides = {side: [run for run in runs if run["side"] == side] for side in ("ours", "peer")}
    pairs = [(ours, peer) for ours, peer in zip(sides["ours"], sides["peer"], strict=False) if "error" not in ours and "error" not in peer]
    ours = [run for run in sides["ours"] if "error" not in run]
    found: dict[str, Any] = {"pairs": len(pairs), "faults": [run["error"] for run in runs if "error" in run]}
    if ours:
        for name in MEDIANS[unit]:
            found[name] = statistics.median(run[name] for run in ours)
        found["over_budget"] = sum(run["process_peak_bytes"] > run["cgroup"]["limit_bytes"] for run in ours)
        found |= over_floor(ours, unit)
    if pairs:
        pace = f"seconds_per_{unit}"
        found[f"peer_{pace}"] = statistics.median(peer[pace] for _, peer in pairs)
        found["peer_peak_bytes"] = statistics.median(peer["cgroup"]["peak_anonymous_bytes"] for _, peer in pairs)
        found["speedup"] = statistics.median(peer[pace] / mine[pace] for mine, peer in pairs)
        floor_kept = found["over_floor"] is None or found["over_floor"] <= part.get("most_over_floor", float("inf"))
        found["kept"] = found["speedup"] >= part.get("least_speedup", 0) and floor_kept and not found["over_budget"]
    return found


def over_floor(ours: list[dict[str, Any]], unit: str) -> dict[str, Any]:
    """The floor by the fastest reads of the job, and how far above it a token took in the median; None where nothing streams."""
    streamed, pace = ours[0][f"streamed_bytes_per_{unit}"], f"seconds_per_{unit}"
    rates = [rate for run in ours for rate in (*run["disk_bandwidth"], streamed / run[pace])]
    floor = streamed / max(rates)
    found = {"disk_bandwidth": max(rates), f"floor_{pace}": floor}
    return found | {"over_floor": statistics.median(run[pace] for run in ours) / floor if streamed else None}


def run_part(name: str, part: Part, pairs: int, args: argparse.Namespace, result: dict[str, Any], file: Path) -> dict[str, Any]:
    """Take turns until there are `pairs` of both, writing the result after every run."""
    model = ensure_model(part["shape"], args.models)
    result["weight_bytes"] = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    while len(result["runs"]) < 2 * pairs:
        side = ("ours", "peer")[len(result["runs"]) % 2]
        with tempfile.TemporaryDirectory(dir=args.models, prefix="offload-") as offload:
            if side == "ours":
                run = our_run(part, model)
            else:
                limit = None if part.get("peer_without_limit") else parse_size(part["ram"])
                run = limited_run(peer_command(part, model, args, offload), part, limit)
        result["runs"].append({"side": side, **run})
        result["summary"] = summary(part, result["runs"])
        if not name.startswith("dry"):
            write_result(file, result)
        pace = run.get("error") or f"{run[f'seconds_per_{unit_of(part)}']:.3f} s per {unit_of(part)}"
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
