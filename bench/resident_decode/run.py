"""resident_decode: prompts read and tokens written per second when everything fits: ours, bitsandbytes, llama.cpp, at equal threads.

python bench/resident_decode/run.py [--pairs N] [--fresh] [--models FOLDER] [--llama-cpp FOLDER] [--shape NAME]

The sides take turns. Results are written after every run; a start that was interrupted goes on where it stopped. A quiet machine,
please. The last part profiles ours: which operators take the time, and how much is Python.
"""

import argparse
import json
import os
import statistics
import sys
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models import LLAMA_CPP, MODELS, PEERS, ensure_gguf, ensure_model
from record import ensure_probed, machine_facts, read_result, run_child, say, write_result

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "cpu.json"
OURS = HERE.parent / "bigger_than_memory" / "ours.py"
MEDIANS = ("decode_tokens_per_second", "prefill_tokens_per_second", "load_seconds")


def command_of(side: dict[str, Any], settings: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """The command that runs one side."""
    shared = ["--prompt-tokens", str(settings["prompt_tokens"]), "--tokens", str(settings["tokens"])]
    threads = ["--threads", str(settings["threads"])]
    model = str(ensure_model(settings["shape"], args.models))
    if "gguf" in side:
        file = ensure_gguf(settings["shape"], side["gguf"], args.models, args.llama_cpp)
        script = [str(PEERS / "llama_cpp_run.py"), "--model", str(file), "--build", str(args.llama_cpp), "--repack"]
        return [sys.executable, *script, *threads, *shared]
    if "bnb" in side:
        script = [str(PEERS / "bnb_run.py"), "--shape", settings["shape"], "--model", model, "--bits", str(side["bnb"])]
        return [sys.executable, *script, *threads, *shared]
    technique = ["--technique", side["technique"]] if side["technique"] else []
    return [sys.executable, str(OURS), "--model", model, "--ram", settings["ram"], "--warm-up", *technique, *shared]


def rows_of(settings: dict[str, Any], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The medians of each side."""
    rows = []
    for name, side in settings["sides"].items():
        mine = [run for run in runs if run["side"] == name and "error" not in run]
        row: dict[str, Any] = {"side": name, "bits": side["bits"], "runs": len(mine)}
        row |= {field: statistics.median(run[field] for run in mine) for field in MEDIANS if mine}
        row["faults"] = [run["error"] for run in runs if run["side"] == name and "error" in run]
        rows.append(row)
    return rows


def take_turns(settings: dict[str, Any], args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Let every side run `pairs` times, one after the other, and write the result after each run."""
    order = [name for _ in range(args.pairs or settings["pairs"]) for name in settings["sides"]]
    for name in order[len(result["runs"]) :]:
        command = command_of(settings["sides"][name], settings, args)
        run = run_child(command, settings["threads"], settings["timeout_seconds"]) | {"side": name, "load_average": list(os.getloadavg())}
        result["runs"].append(run)
        result["rows"] = rows_of(settings, result["runs"])
        write_result(args.result, result)
        pace = run.get("error") or f"{run['prefill_tokens_per_second']:.1f} read, {run['decode_tokens_per_second']:.2f} written per second"
        say(f"{len(result['runs'])}/{len(order)} {name}: {pace}")


def profile_ours(settings: dict[str, Any], args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Where our time goes, once for each of our sides."""
    model = str(ensure_model(settings["shape"], args.models))
    for name, side in settings["sides"].items():
        if "technique" in side and name not in result["where"]:
            command = [sys.executable, str(HERE / "where.py"), "--model", model, "--technique", side["technique"], "--ram", settings["ram"]]
            result["where"][name] = run_child(command, settings["threads"], settings["timeout_seconds"])
            write_result(args.result, result)
            say(f"{name}: {result['where'][name].get('share') or result['where'][name]['error']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, help="runs of each side in all, those of an earlier start included")
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs")
    parser.add_argument("--models", type=Path, default=MODELS, help="where model folders are, or are made")
    parser.add_argument("--llama-cpp", type=Path, default=LLAMA_CPP, help="what build_llama_cpp.sh made")
    parser.add_argument("--shape", help="another shape of peers/shapes.json, such as `tiny`")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    settings = tomllib.loads((HERE / "settings.toml").read_text())
    settings["shape"] = args.shape or settings["shape"]
    args.models.mkdir(parents=True, exist_ok=True)
    facts = machine_facts(settings["threads"]) | {"probed": ensure_probed(settings["threads"])}
    before = {} if args.fresh else read_result(args.result)
    asked = {name: value for name, value in settings.items() if name != "pairs"}
    fresh = {"question": "resident_decode", "machine": facts, "settings": asked, "rows": [], "runs": [], "where": {}}
    result = before if before.get("settings") == asked else fresh
    take_turns(settings, args, result)
    profile_ours(settings, args, result)
    print(json.dumps({"rows": result["rows"]}))


if __name__ == "__main__":
    main()
