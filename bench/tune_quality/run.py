"""tune_quality: held-out loss of QST beside LoRA's, and of DyLoRA cut at each rank beside a LoRA trained at that rank, on real text.

python bench/tune_quality/run.py [--model NAME] [--only TEXT] [--seeds 0,1,2] [--fresh]     (about an hour a model, one thread)
python bench/tune_quality/run.py --sweep METHOD=RATE[*MIX_RATE],… [--model NAME] [--only TASK]

A run is one model, task, method and seed; what is in results/MODEL.json already is not run again. All methods of a task see the same
batches in the same order, as many; but what ends in `-6x` goes on for 6 times the steps. `domain-1500` is `domain` in 1,500 steps.
Nothing was chosen on the held-out part: `--sweep` scores rates on the validation part, with a seed of its own, and writes
results/sweep_MODEL.json; the settings name the best of the few that were tried. Data: `TIGHTFIT_DATA`, or ../shared/data.
"""

import argparse
import json
import math
import statistics
import sys
import time
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from record import cache_folder, machine_facts, read_result, say, write_result
from stories260k import convert, data_folder
from tasks import IGNORED, Record, Task, batch_of, batches, read_task

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SWEEP_SEED = 100
"""Of no reported run."""
NESTED = ("dylora", "dylora-low")
"""Methods that serve every rank."""


def folder_of(model: str) -> Path:
    """The model's folder; stories260K is converted first."""
    if model == "demo":
        return HERE.parents[1] / "src" / "tightfit" / "presets" / "tightfit-demo"
    return convert(cache_folder() / "models" / model)


def load(model: str) -> nn.Module:
    """The model in 32 bits."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder_of(model), dtype=torch.float32)


@cache
def task_of(model: str, name: str, tokens: int, validation: int, held_out: int) -> Task:
    """The task in the model's tokens; cut once."""
    from transformers import AutoTokenizer

    return read_task(name.partition("-")[0], data_folder(), AutoTokenizer.from_pretrained(folder_of(model)), tokens, validation, held_out)


def techniques_of(method: str, settings: dict[str, Any], model: str, seed: int) -> dict[str, dict[str, Any]]:
    """What a method does to the model. The number in `lora-4` is its rank, in `side-4` its reduction; `base-under` is what adapters see.

    `side-1-base` begins as a copy of the base; `dylora-low` has settings of its own; `dylora-6x` is `dylora` for longer.
    """
    kind, number, start = [*method.split("-"), "", ""][:3]
    under = settings["models"][model]["under"]
    if kind in ("full", "base"):
        return under if number == "under" else {}
    own = settings["models"][model]["side"] if kind == "side" else settings["methods"][kind]
    own = own | settings["copied_side"] if start == "base" else own
    own = own | settings["low_dylora"] if (kind, number) == ("dylora", "low") else own
    named = {"seed": seed} if kind == "dylora" else {{"side": "reduction", "lora": "rank"}[kind]: int(number)}
    return under | {kind: own | named}


def make_optimizer(model: nn.Module, rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW; parameters whose module asks for another pace get it (`contracts.Paced`)."""
    from tightfit.contracts import Paced

    factors = {
        id(dict(module.named_parameters(recurse=False))[name]): factor
        for module in model.modules()
        if isinstance(module, Paced)
        for name, factor in module.rate_factors.items()
    }
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "lr": rate * factor} for factor, group in groups.items()], weight_decay=weight_decay, fused=True
    )


def pace(steps: int, warmup: float) -> Any:
    """Warmup, then a cosine to zero, as a factor by step."""
    rising = max(1, round(steps * warmup))
    return lambda step: (step + 1) / rising if step < rising else 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def train(model: nn.Module, task: Task, asked: dict[str, Any], schedule: dict[str, Any], rate: float, seed: int) -> list[float]:
    """Tune `model` in place; the mean training loss of each tenth of the steps."""
    from tightfit.contracts import Policy

    policies = [module for module in model.modules() if isinstance(module, Policy)]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(model, rate, schedule["weight_decay"])
    slowing = torch.optim.lr_scheduler.LambdaLR(optimizer, pace(asked["steps"], schedule["warmup"]))
    losses = []
    for step, batch in enumerate(batches(task.train, asked["batch"], asked["steps"], seed)):
        for policy in policies:
            policy.begin_step(step)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(learned, schedule["clip"])
        optimizer.step()
        slowing.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    for policy in policies:
        policy.end_training()
    tenth = max(1, asked["steps"] // 10)
    return [statistics.mean(losses[at : at + tenth]) for at in range(0, len(losses), tenth)]


@torch.no_grad()
def loss_on(model: nn.Module, records: list[Record], size: int = 16) -> float:
    """Mean loss over all counted tokens of the records."""
    total, counted = 0.0, 0
    ordered = sorted(records, key=lambda record: len(record[0]))
    for at in range(0, len(ordered), size):
        batch = batch_of(ordered[at : at + size])
        tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += float(model(**batch, use_cache=False).loss) * tokens
        counted += tokens
    return total / counted


def tune(model_name: str, task_name: str, method: str, seed: int, rate: float, settings: dict[str, Any], part: str) -> dict[str, Any]:
    """One run: its settings, its losses on `part`, and what it learned with."""
    import tightfit

    began, asked = time.perf_counter(), dict(settings["models"][model_name]["tasks"][task_name])
    asked["steps"] *= settings["longer"].get(method, 1)
    asked.pop("reductions", None)
    torch.manual_seed(seed)
    model = load(model_name)
    task = task_of(model_name, task_name, asked["tokens"], asked["validation"], asked["held_out"])
    chosen = techniques_of(method, settings, model_name, seed)
    if chosen:
        tightfit.apply(model, chosen)
    row = {"task": task_name, "method": method, "seed": seed, "rate": rate, "techniques": chosen, **asked}
    if method.partition("-")[0] != "base":
        row["learned_parameters"] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        row["curve"] = train(model.train(), task, asked, settings["schedule"], rate, seed)
    model.eval()
    records = vars(task)[part]
    row[part], row["counted_tokens"] = loss_on(model, records), task.counted(part)
    if method.startswith("dylora"):
        row["by_rank"] = by_rank(model, records, settings["ranks"])
    row["seconds"] = round(time.perf_counter() - began, 1)
    say(f"{model_name} {task_name} {method} seed {seed} rate {rate:g}: {row[part]:.4f}  ({row['seconds']:.0f} s)")
    return row


def by_rank(model: nn.Module, records: list[Record], ranks: list[int]) -> dict[str, float]:
    """The loss of the one model, cut at each rank."""
    from tightfit.techniques.dylora import set_rank

    losses = {}
    for rank in ranks:
        set_rank(model, rank)
        losses[str(rank)] = loss_on(model, records)
    return losses


def jobs_of(settings: dict[str, Any], model: str, seed: int) -> Iterator[tuple[str, str]]:
    """Task and method of every run of a model with a seed; what is `once` only with the first."""
    asked, found = settings["models"][model], []
    for task, details in asked["tasks"].items():
        sides = [f"side-{reduction}" for reduction in details.get("reductions", asked["reductions"])]
        bases = ["base", "base-under"] if asked["under"] else ["base"]
        found += [(task, method) for method in (*bases, "lora-16", *sides, "full")]
    for task in asked["ranks_on"]:
        found += [(task, method) for method in (*NESTED, *(f"lora-{rank}" for rank in settings["ranks"] if rank != 16))]
        found += [(task, method) for method in settings["longer"]]
    yield from (job for job in found if seed == settings["seeds"][0] or job[1] not in settings["once"])


def summary(rows: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Per task: mean and spread over the seeds of each method, and the ratios that the bars are about."""
    found: dict[str, Any] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        losses = {}
        for row in rows:
            if row["task"] == task:
                losses.setdefault(row["method"], {})[row["seed"]] = row["held_out"]
                for rank, loss in row.get("by_rank", {}).items():
                    losses.setdefault(f"{row['method']}-{rank}", {})[row["seed"]] = loss
        methods = {
            method: {
                "mean": statistics.mean(by_seed.values()),
                "spread": statistics.stdev(by_seed.values()) if len(by_seed) > 1 else 0.0,
                "seeds": sorted(by_seed),
            }
            for method, by_seed in losses.items()
        }
        found[task] = {"methods": methods}
        pairs = {ours: "lora-16" for ours in losses if ours.startswith("side-")}
        pairs |= {f"{cut}-{rank}": f"lora-{rank}" for cut in (*NESTED, *settings["longer"]) for rank in settings["ranks"]}
        found[task]["over_lora"] = {
            ours: compared(losses[ours], losses[theirs], settings["most_over_lora"])
            for ours, theirs in pairs.items()
            if ours in losses and theirs in losses
        }
        if {"lora-16", "base"} <= set(losses):
            start, gain = methods["base"]["mean"], methods["base"]["mean"] - methods["lora-16"]["mean"]
            found[task]["share_of_gain"] = {ours: (start - methods[ours]["mean"]) / gain for ours in losses if ours.startswith("side-")}
    return found


def compared(ours: dict[int, float], theirs: dict[int, float], most: float) -> dict[str, Any]:
    """Ratios by seed, since both saw the same batches."""
    ratios = [ours[seed] / theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not ratios:
        return {}
    mean = statistics.mean(ratios)
    return {"mean": mean, "worst": max(ratios), "ratios": ratios, "seeds": sorted(ours.keys() & theirs.keys()), "kept": mean <= 1 + most}


def run_all(model: str, args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """The runs of one model; each is written as soon as it is done."""
    file = RESULTS / f"{model}.json"
    before = {} if args.fresh else read_result(file)
    rows, facts = before.get("rows", []), before.get("machine") or machine_facts(settings["threads"])
    done = {(row["task"], row["method"], row["seed"]) for row in rows}
    for seed in args.seeds or settings["seeds"]:
        for task, method in jobs_of(settings, model, seed):
            rate = settings["models"][model]["rates"].get(method, 0.0)
            if (task, method, seed) in done or args.only not in f"{task} {method}":
                continue
            rows.append(tune(model, task, method, seed, rate, settings, "held_out"))
            values = {"question": "tune_quality", "model": model, "machine": facts, "settings": settings}
            write_result(file, values | {"summary": summary(rows, settings), "rows": rows})
    print(json.dumps(summary(rows, settings)))


def sweep(model: str, args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Score rates on the validation part."""
    file = RESULTS / f"sweep_{model}.json"
    for task in settings["models"][model]["tasks"]:
        for wish in args.sweep.split(","):
            method, _, rate = wish.partition("=")
            rate, _, mix = rate.partition("*")
            if args.only not in task:
                continue
            if mix:
                settings["models"][model]["side"]["mix_rate"] = float(mix)
            row = tune(model, task, method, SWEEP_SEED, float(rate), settings, "validation")
            rows = [*read_result(file).get("rows", []), row]
            write_result(file, {"question": "tune_quality", "model": model, "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["stories260k", "demo"])
    parser.add_argument("--only", default="", help="runs whose task and method hold this text, such as `domain side`")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--sweep", default="", help="rates to score on the validation part, such as `side-4=0.01*10,lora-16=0.01`")
    args = parser.parse_args()
    settings = tomllib.loads((HERE / "settings.toml").read_text())
    torch.set_num_threads(settings["threads"])
    for model in [args.model] if args.model else settings["models"]:
        (sweep if args.sweep else run_all)(model, args, settings)


if __name__ == "__main__":
    main()
