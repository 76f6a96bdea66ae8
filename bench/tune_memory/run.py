"""tune_memory: bytes at the peak and seconds of a training step by way of tuning, beside PEFT, bitsandbytes and the paper's figures.

python bench/tune_memory/run.py --part rehearsed|measured|paired [--only TEXT] [--missing] [--pairs N] [--model SHAPE] [--dry]

rehearsed: the paper's shapes on paper, nothing is allocated; PEFT's rows are its own modules on fake tensors (15 minutes, one thread).
measured: real steps on the CPU, each in a process of its own (about an hour). paired: ours and the peer take turns, A B A B (about
half an hour). The last two want a quiet machine. Every row is written as soon as it is done; `--only` keeps the other rows' results.
`--dry` takes real steps of a few tokens of the demo model, to see that the driver works; give it a `--results` folder to throw away.
"""

import argparse
import json
import statistics
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models import MODELS, PEERS, ensure_model
from record import CHECKOUT, machine_facts, read_result, run_child, say, write_result

HERE = Path(__file__).resolve().parent
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
"""What `keep_heap_tight` does for ours, for a peer's process."""
Row = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["rehearsed", "measured", "paired"], required=True)
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--missing", action="store_true", help="keep rows that have a result")
    parser.add_argument("--pairs", type=int, help="runs of each side")
    parser.add_argument("--model", help="another shape of peers/shapes.json for the real steps")
    parser.add_argument("--models", type=Path, default=MODELS, help="where model folders are, or are made")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--dry", action="store_true")
    return parser.parse_args()


def ways_of(settings: Mapping[str, Any], combinations: Sequence[Sequence[str]]) -> list[str]:
    """Every way by name: ours with all combinations of switches, the peers' with those that they have."""
    ours = [" + ".join([way, *switches]) for way in settings["ways"] for switches in combinations]
    peers = [" + ".join([peer, *switches]) for peer in settings["peers"] for switches in combinations if "chunked_loss" not in switches]
    return ours + peers


def techniques_of(settings: Mapping[str, Any], way: str) -> list[str]:
    """What is asked for by a way of ours."""
    name, *switches = way.split(" + ")
    return [*settings["ways"][name], *(text for switch in switches for text in settings["switches"][switch])]


def rehearse_row(settings: Mapping[str, Any], shape: Row, way: str) -> Row:
    """One way at one of the paper's shapes, in this process."""
    from peft_on_paper import PeftQLoRA
    from tuning import made

    import tightfit
    from tightfit.describe.source import describe
    from tightfit.rehearse.rehearsal import rehearse

    name, *switches = way.split(" + ")
    if name in settings["peers"]:
        peer = settings["peers"][name]
        techniques: list[Any] = [PeftQLoRA(peer["prepared"], "recompute" in switches)]
    else:
        techniques = made(techniques_of(settings, way))
    began = time.monotonic()
    skeleton = describe(shape["model"], "tune", random_weights=True)
    workload = tightfit.Workload("tune", shape["batch"], shape["tokens"], micro_batch=shape["batch"])
    footprint = rehearse(skeleton.meta_model, workload, techniques)
    return {
        "peak_bytes": footprint.peak_bytes,
        "peak": {kind: size for kind, size in footprint.peak.items() if size},
        "peak_phase": footprint.peak_phase,
        "flops": sum(work.get("flops", 0) for work in footprint.work.values()),
        "paper_gb": shape["paper"].get(name) if not switches else None,
        "seconds": round(time.monotonic() - began, 1),
    }


def command_of(settings: Mapping[str, Any], way: str, job: Row) -> list[str]:
    """The command that runs one way for real."""
    name, *switches = way.split(" + ")
    if name not in settings["peers"]:
        return [sys.executable, str(HERE / "one.py"), json.dumps(job | {"techniques": techniques_of(settings, way)})]
    peer = settings["peers"][name]
    numbers = {"--batch": job["batch"], "--tokens": job["tokens"], "--threads": settings["threads"]}
    numbers |= {"--steps": job["steps"], "--warm-up": job["warm_up"]}
    flags = {"--prepared": peer["prepared"], "--checkpointing": "recompute" in switches, "--records": job["way"] == "allocator"}
    command = [sys.executable, str(PEERS / "tune_peft.py"), "--model", job["model"], "--way", peer["way"]]
    command += [text for flag, value in numbers.items() for text in (flag, str(value))]
    return [*command, *(flag for flag, wanted in flags.items() if wanted)]


def real_run(settings: Mapping[str, Any], way: str, job: Row, **environment: str) -> Row:
    """One way in a process of its own."""
    return run_child(command_of(settings, way, job), settings["threads"], settings["timeout_seconds"], **environment)


def measure_row(settings: Mapping[str, Any], folder: str, shape: Row, way: str) -> Row:
    """Both looks at one way: tensors by the allocator's records over two steps, and the process by itself, which is timed."""
    job = {"model": folder, "batch": shape["batch"], "tokens": shape["tokens"], "warm_up": 0, "steps": 2, "way": "allocator"}
    found = real_run(settings, way, job)
    if "error" in found or not shape["process"]:
        return found
    part = settings["measured"]
    alone = real_run(settings, way, job | {"way": "process", "warm_up": part["warm_up"], "steps": part["steps"]}, **GIVE_BACK)
    if "error" in alone:
        return alone
    return found | alone | {"process_bytes": alone["peak_rss_bytes"] - alone["rss_bytes_before"]}


def pair_row(settings: Mapping[str, Any], folder: str, row: Row, pairs: int) -> Row:
    """Ours and the peer in turn, and the medians."""
    part = settings["paired"]
    job = {"model": folder, "way": "process", **{name: part[name] for name in ("batch", "tokens", "warm_up", "steps")}}
    runs = []
    for _ in range(pairs):
        ours = real_run(settings, row["ours"], job | {"heap": part["our_heap"]})
        peer = real_run(settings, row["peer"], job, **(GIVE_BACK if part["peer_heap"] == "tight" else {}))
        runs.append({"ours": ours, "peer": peer})
        faults = [run["error"] for run in runs[-1].values() if "error" in run]
        if faults:
            return {"error": "; ".join(faults)}
    medians = {side: statistics.median(run[side]["seconds_per_step"] for run in runs) for side in ("ours", "peer")}
    speedup = statistics.median(run["peer"]["seconds_per_step"] / run["ours"]["seconds_per_step"] for run in runs)
    return {
        "ours_seconds_per_step": medians["ours"],
        "peer_seconds_per_step": medians["peer"],
        "speedup": speedup,
        "kept": speedup >= row["least_speedup"],
        "runs": runs,
    }


def folder_of(args: argparse.Namespace, part: Row) -> str:
    """The model of the real steps."""
    return str(CHECKOUT / "src/tightfit/presets/tightfit-demo") if args.dry else str(ensure_model(part["model"], args.models))


def dried(settings: Row) -> Row:
    """Settings under which a row takes seconds."""
    few = {"batch": 2, "tokens": 16, "warm_up": 0, "steps": 1}
    settings["paired"] |= few
    settings["measured"] |= few | {"rows": [few | {"process": True}]}
    return settings | {"pairs": 1}


def jobs_of(args: argparse.Namespace, settings: Row) -> tuple[dict[str, Callable[[], Row]], dict[str, Row]]:
    """Of each row by name: what makes its result, and what is known of it before."""
    jobs: dict[str, Callable[[], Row]] = {}
    known: dict[str, Row] = {}
    part = settings[args.part]
    if args.part == "paired":
        folder = folder_of(args, part)
        for row in part["rows"]:
            name = f"{row['ours']} | {row['peer']}"
            known[name] = {**row, **{key: part[key] for key in ("model", "batch", "tokens", "our_heap", "peer_heap")}}
            jobs[name] = lambda row=row: pair_row(settings, folder, row, args.pairs or settings["pairs"])
        return jobs, known
    folder = folder_of(args, part) if args.part == "measured" else ""
    for shape in part["rows"]:
        for way in ways_of(settings, part["combinations"]):
            if args.part == "rehearsed" and way.startswith("PEFT lora"):
                continue
            at = f"{shape.get('model', part.get('model'))} {shape['batch']}x{shape['tokens']}"
            known[f"{at} {way}"] = {"at": at, "way": way} | {key: value for key, value in shape.items() if key != "paper"}
            if args.part == "rehearsed":
                jobs[f"{at} {way}"] = lambda shape=shape, way=way: rehearse_row(settings, shape, way)
            else:
                jobs[f"{at} {way}"] = lambda shape=shape, way=way: measure_row(settings, folder, shape, way)
    return jobs, known


def summary_of(part: str, rows: list[Row]) -> Row:
    """The ratios that the question asks for, by shape."""
    done = [row for row in rows if "error" not in row]
    if part == "paired":
        return {row["name"]: {name: row[name] for name in ("speedup", "kept")} for row in done}
    key = "peak_bytes" if part == "rehearsed" else "measured_peak_bytes"
    shapes = {row["at"]: {other["way"]: other[key] for other in done if other["at"] == row["at"]} for row in done}
    paper = {row["at"]: {other["way"]: other.get("paper_gb") for other in done if other["at"] == row["at"]} for row in done}
    return {at: ratios(peaks, paper[at]) for at, peaks in shapes.items()}


def ratios(peaks: Mapping[str, int], paper: Mapping[str, float | None]) -> Row:
    """Of one shape. A ratio is absent while one of its sides is."""
    both = " + recompute + chunked_loss"
    wanted = {
        "PEFT qlora / qst": ("PEFT qlora", "qst"),
        "PEFT qlora, lean / qst": ("PEFT qlora, lean", "qst"),
        "PEFT qlora, lean / qst, recomputed and chunked": ("PEFT qlora, lean", f"qst{both}"),
        "full / qst": ("full", "qst"),
        "full / qst, recomputed and chunked": ("full", f"qst{both}"),
        "qst, recomputed and chunked / PEFT qlora + recompute": (f"qst{both}", "PEFT qlora + recompute"),
        "qst, recomputed and chunked / PEFT qlora, lean + recompute": (f"qst{both}", "PEFT qlora, lean + recompute"),
        "qlora / PEFT qlora, lean": ("qlora", "PEFT qlora, lean"),
        "qlora + recompute / PEFT qlora, lean + recompute": ("qlora + recompute", "PEFT qlora, lean + recompute"),
        "qlora, recomputed and chunked / PEFT qlora + recompute": (f"qlora{both}", "PEFT qlora + recompute"),
        "qlora, recomputed and chunked / PEFT qlora, lean + recompute": (f"qlora{both}", "PEFT qlora, lean + recompute"),
    }
    found: Row = {name: peaks[over] / peaks[under] for name, (over, under) in wanted.items() if over in peaks and under in peaks}
    for name in ("qlora", "full"):
        if paper.get(name) and paper.get("qst"):
            found[f"paper: {name} / qst"] = paper[name] / paper["qst"]
    return found


def line_of(name: str, row: Row) -> str:
    """What a person wants to see while it runs."""
    if "error" in row:
        return f"FAILED {name}: {row['error']}"
    peak = row.get("peak_bytes") or row.get("measured_peak_bytes")
    pace = f" {row['seconds_per_step']:.2f} s" if row.get("seconds_per_step") else ""
    return f"{name}: {peak / 2**30:.2f} GiB{pace}" if peak else f"{name}: {row['speedup']:.2f} times as fast"


def main() -> None:
    args = parse_arguments()
    settings = tomllib.loads((HERE / "settings.toml").read_text())
    for part in ("measured", "paired"):
        settings[part]["model"] = args.model or settings[part]["model"]
    settings = dried(settings) if args.dry else settings
    facts = machine_facts(settings["threads"])
    name = args.part if not args.model else f"{args.part}-{args.model}"
    file = args.results / f"{name}.json"
    jobs, known = jobs_of(args, settings)
    done = {row["name"]: row for row in read_result(file).get("rows", []) if row["name"] in jobs}
    for row_name, job in jobs.items():
        if args.only not in row_name or (args.missing and "error" not in done.get(row_name, {"error": ""})):
            continue
        done[row_name] = {"name": row_name, **known[row_name], **job()}
        rows = [done[other] for other in jobs if other in done]
        part = {key: value for key, value in settings.items() if key not in ("rehearsed", "measured", "paired")}
        result = {"question": "tune_memory", "part": args.part, "machine": facts, "settings": part, "summary": summary_of(args.part, rows)}
        write_result(file, result | {"rows": rows})
        say(line_of(row_name, done[row_name]))
    print(json.dumps(read_result(file).get("summary", {})))


if __name__ == "__main__":
    main()
