"""quantize_quality: how good trained models are in few bits, by method: perplexity, or how near their embeddings stay.

python bench/quantize_quality/run.py [--model NAME] [--only TEXT] [--seeds 0,1,2] [--fresh]
python bench/quantize_quality/run.py --missing            (says what is still to run)
python bench/quantize_quality/run.py --explore [--model NAME] [--only TEXT]     (one setting of `lean` at a time)

A row is one model, method, number of bits and seed; what is in results/MODEL.json already is not run again. Each is written to a folder
by `tightfit.verbs.quantizing` and read by plain `from_pretrained`; seconds are the processor's. Peers are in `peers.py`. Data:
`TIGHTFIT_DATA`, or ../shared/data.
"""

import argparse
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from peers import peer_model
from record import machine_facts, read_result, say, write_result
from subjects import Subject, subject_of

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
EXPLORED = ("power", "weighting", "spread", "aim", "damping", "rounds", "act_order")

Job = tuple[str, int, int]
"""Method, bits, seed."""


def jobs_of(model: str, settings: dict[str, Any], seeds: list[int]) -> Iterator[Job]:
    """All rows of a model, the first seed first; what reads no text with that one only."""
    for seed in seeds:
        for method in [*settings["methods"], *settings["models"][model]["peers"]]:
            for bits in settings["peers"].get(method, settings["bits"]):
                if seed == settings["seeds"][0] or method not in settings["once"]:
                    yield method, bits, seed


def explored(settings: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """`lean` as it is, then with one setting changed: a name, bits, and the settings."""
    for bits in settings["explore"]["bits"]:
        yield "lean", bits, {}
        for name in EXPLORED:
            for value in settings["explore"][name]:
                yield f"{name}={value}", bits, {name: value}


def quantized(subject: Subject, technique: str, chosen: dict[str, Any], seed: int) -> dict[str, Any]:
    """Quantize to a folder that is removed again, and score what `from_pretrained` makes of it."""
    from tightfit.verbs.quantizing import plan_quantize, quantize

    samples = subject.calibration(seed)
    with tempfile.TemporaryDirectory() as room:
        began, output = time.process_time(), Path(room) / "model"
        planned = plan_quantize(str(subject.folder), samples, technique, chosen)
        quantize(planned, samples, str(output))
        seconds = time.process_time() - began
        score = subject.score(subject.load(output))
    return {"bits_per_weight": planned.bits_per_weight, "settings": chosen, "seconds": round(seconds, 1), **score}


def row_of(subject: Subject, model: str, job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    """One row."""
    method, bits, seed = job
    if method in settings["peers"]:
        began = time.process_time()
        made, size = peer_model(method, bits, subject.load(subject.folder))
        found = {"bits_per_weight": size, "seconds": round(time.process_time() - began, 1), **subject.score(made)}
    else:
        chosen = dict(settings["methods"][method]) | {"bits": bits}
        if chosen.get("group") == "group":
            chosen["group"] = settings["models"][model]["group"]
        found = quantized(subject, chosen.pop("technique"), chosen, seed)
    return {"method": method, "bits": bits, "seed": seed, **found}


def summary(rows: list[dict[str, Any]], dense: float, settings: dict[str, Any]) -> dict[str, Any]:
    """By bits and method: means over the seeds, and the share of plain GPTQ's gap to the dense model that is closed; then the bars."""
    found: dict[str, Any] = {}
    for bits in settings["bits"]:
        here = [row for row in rows if row["bits"] == bits]
        plain = {row["seed"]: row["gap_in"] - dense for row in here if row["method"] == settings["against"]}
        methods = {}
        for method in dict.fromkeys(row["method"] for row in here):
            own = [row for row in here if row["method"] == method]
            methods[method] = {name: statistics.mean(row[name] for row in own) for name in own[0] if isinstance(own[0][name], float)}
            methods[method]["gap"] = statistics.mean(row["gap_in"] for row in own) - dense
            methods[method]["spread"] = statistics.stdev(row["gap_in"] for row in own) if len(own) > 1 else 0.0
            methods[method]["seeds"] = sorted(row["seed"] for row in own)
            shares = [1 - (row["gap_in"] - dense) / plain[row["seed"]] for row in own if row["seed"] in plain]
            methods[method]["share_closed"] = statistics.mean(shares) if shares else None
        found[str(bits)] = methods
    return found | {"bars": bars(found, settings)}


def bars(found: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What issue was taken on: None where something is missing. Ours of any width counts against a peer that is as large or larger."""
    ours = [way | {"name": name, "of": bits} for bits, ways in found.items() for name, way in ways.items() if name.startswith("lean")]
    kept: dict[str, Any] = {}
    for bits, ways in found.items():
        named = [ways[name]["gap"] for name in ("lean", "gptq", "rtn") if name in ways]
        kept[f"{bits}: lean < gptq < rtn"] = named == sorted(named) if len(named) == 3 else None
        share = ways.get("lean", {}).get("share_closed")
        if int(bits) < 4:
            kept[f"{bits}: closes {settings['least_share']:.0%}"] = None if share is None else share >= settings["least_share"]
        for peer in ("gptq-strong", *settings["peers"]):
            if peer in ways:
                small = [way for way in ours if way["bits_per_weight"] <= ways[peer]["bits_per_weight"] + 5e-3]
                best = min(small, key=lambda way: way["gap"], default=None)
                kept[f"{bits}: ahead of {peer}"] = best["gap"] < ways[peer]["gap"] if best else None
                kept[f"{bits}: ahead of {peer}, by"] = f"{best['name']} of {best['of']} bits" if best else None
    return kept


def run_all(model: str, args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """The rows of one model; each is written as soon as it is done."""
    file = RESULTS / f"{model}.json"
    before = {} if args.fresh else read_result(file)
    rows, facts = before.get("rows", []), before.get("machine") or machine_facts(settings["threads"])
    done = {(row["method"], row["bits"], row["seed"]) for row in rows}
    wanted = [job for job in jobs_of(model, settings, args.seeds or settings["seeds"]) if job not in done and _asked(job, args.only)]
    if args.missing:
        print("\n".join(f"{model} {method} {bits} bits seed {seed}" for method, bits, seed in wanted))
        return
    subject = subject_of(model, settings)
    dense = before.get("dense") or subject.score(subject.load(subject.folder))
    for job in wanted:
        rows.append(row_of(subject, model, job, settings))
        say(f"{model} {' '.join(map(str, job))}: {_told(rows[-1])}")
        values = {"question": "quantize_quality", "model": model, "machine": facts, "settings": settings, "dense": dense}
        write_result(file, values | {"summary": summary(rows, dense["gap_in"], settings), "rows": rows})


def explore(model: str, args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """One setting of `lean` at a time; into results/explore_MODEL.json."""
    file = RESULTS / f"explore_{model}.json"
    before = {} if args.fresh else read_result(file)
    rows, facts = before.get("rows", []), before.get("machine") or machine_facts(settings["threads"])
    done = {(row["change"], row["bits"]) for row in rows}
    wanted = [one for one in explored(settings) if one[:2] not in done and _asked(one[:2], args.only)]
    if args.missing:
        print("\n".join(f"explore {model} {change} {bits} bits" for change, bits, _ in wanted))
        return
    subject, seed = subject_of(model, settings), settings["seeds"][0]
    dense = before.get("dense") or subject.score(subject.load(subject.folder))
    for change, bits, chosen in wanted:
        found = quantized(subject, "lean", chosen | {"bits": bits}, seed)
        rows.append({"change": change, "bits": bits, "seed": seed, **found})
        say(f"{model} {change} {bits}: {_told(rows[-1])}")
        write_result(file, {"question": "quantize_quality", "model": model, "machine": facts, "dense": dense, "rows": rows})


def _asked(job: tuple[Any, ...], only: str) -> bool:
    """`--only gptq,3` asks for words that all are in the row's name; several such with `;` between."""
    words = " ".join(map(str, job)).split()
    return not only or any(all(word in words for word in choice.split(",")) for choice in only.split(";"))


def _told(row: dict[str, Any]) -> str:
    scores = ", ".join(f"{name} {row[name]:.4f}" for name in ("perplexity", "cosine", "spearman") if name in row)
    return f"{row['bits_per_weight']:.3f} bits, {scores}  ({row['seconds']:.0f} s)"


def main() -> int:
    settings = tomllib.loads((HERE / "settings.toml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(settings["models"]))
    parser.add_argument("--only", default="", help="words of a row's name: `lean,3` or `lean,3;gptq,3`")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--explore", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(settings["threads"])
    for model in [args.model] if args.model else settings["explore"]["models"] if args.explore else settings["models"]:
        (explore if args.explore else run_all)(model, args, settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
