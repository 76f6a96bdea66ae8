"""Tune tables: what the page of benchmarks shows of training steps."""

from typing import Any

from cells import ABSENT, Results, percent, table, times, told, yes

from tightfit.terms.units import show_bytes, show_seconds

TUNE_FIGURE = "figures/tune_quality.png"


def tune_memory(results: Results) -> str:
    """Peaks and seconds of a training step by way of tuning."""
    parts = [_rehearsed(results["rehearsed"])] if "rehearsed" in results else [ABSENT]
    for name, result in results.items():
        if name.startswith("measured"):
            parts.append(_measured(name, result))
        if name.startswith("paired"):
            parts.append(_paired(name, result))
    return "\n\n".join(parts)


_BOTH = " + recompute + chunked_loss"
_PAPER_WAYS = {
    "full": "full",
    "LoRA": "lora",
    "QLoRA": "qlora",
    f"QLoRA{_BOTH}": f"qlora{_BOTH}",
    "PEFT QLoRA": "PEFT qlora",
    "PEFT QLoRA + recompute": "PEFT qlora + recompute",
    "QST": "qst",
    "QST, pooled": "qst max_pool",
    f"QST{_BOTH}": f"qst{_BOTH}",
}
"""Columns of the rehearsed table, and the ways that they show."""

_RATIOS = {
    "PEFT QLoRA / QST": "PEFT qlora / qst",
    "lean / QST": "PEFT qlora, lean / qst",
    "lean / QST, recomputed and chunked": "PEFT qlora, lean / qst, recomputed and chunked",
    "paper": "paper: qlora / qst",
    "full / QST": "full / qst",
    "paper, full": "paper: full / qst",
    "QST, recomputed and chunked / PEFT QLoRA + recompute": "qst, recomputed and chunked / PEFT qlora + recompute",
    "ours, recomputed and chunked / PEFT QLoRA + recompute": "qlora, recomputed and chunked / PEFT qlora + recompute",
}
"""Columns of the table of ratios, and what they are called in the results."""


def _rehearsed(result: dict[str, Any]) -> str:
    """The paper's shapes: bytes on paper beside what it prints, and the ratios."""
    shapes: dict[str, dict[str, Any]] = {}
    for row in result["rows"]:
        shapes.setdefault(row["at"], {})[row["way"]] = row

    def cell(found: dict[str, Any] | None) -> str:
        if found is None or "error" in found:
            return "-"
        paper = f" ({found['paper_gb']:g})" if found.get("paper_gb") else ""
        return f"{found['peak_bytes'] / 2**30:.1f}{paper}"

    rows = [[at, *(cell(ways.get(way)) for way in _PAPER_WAYS.values())] for at, ways in shapes.items()]
    summary = result["summary"]
    ratios = [[at, *(times(found.get(name)) for name in _RATIOS.values())] for at, found in summary.items()]
    intro = (
        "GiB at the peak of a training step at the shapes of the QST paper, by rehearsal, in brackets the paper's own GB. Nothing was "
        "allocated and no GPU was used. *PEFT QLoRA* is PEFT's and bitsandbytes' own modules rehearsed likewise: after "
        "`prepare_model_for_kbit_training`, under bf16 autocast; *lean*: without either, only the adapters in float32."
    )
    first = table("|".join(["shape", *(f"{title}:" for title in _PAPER_WAYS)]), rows)
    second = table("|".join(["ratio", *(f"{title}:" for title in _RATIOS)]), ratios)
    return "\n\n".join([intro, first, second, told(result["machine"], "tune_memory", "rehearsed")])


def _measured(name: str, result: dict[str, Any]) -> str:
    """Real steps."""
    rows = [
        [
            row["at"],
            row["way"],
            show_bytes(row["measured_peak_bytes"]),
            show_bytes(row["predicted_peak_bytes"]) if "predicted_peak_bytes" in row else "-",
            show_bytes(row["process_bytes"]) if "process_bytes" in row else "-",
            show_seconds(row["seconds_per_step"]) if row.get("process_bytes") else "-",
        ]
        for row in result["rows"]
        if "error" not in row
    ]
    intro = "Real steps on the CPU: tensors at the peak by the allocator's records, and what the process took beyond its libraries."
    return "\n\n".join([intro, table("shape|way|tensors:|promised:|process:|a step:", rows), told(result["machine"], "tune_memory", name)])


def _paired(name: str, result: dict[str, Any]) -> str:
    """Seconds side by side."""
    rows = [
        [
            row["ours"],
            show_seconds(row["ours_seconds_per_step"]),
            row["peer"],
            show_seconds(row["peer_seconds_per_step"]),
            times(row["speedup"]),
            times(row["least_speedup"]),
            yes(row["kept"]),
        ]
        for row in result["rows"]
        if "error" not in row
    ]
    body = table("ours|a step:|peer|a step:|faster:|wished:|kept", rows)
    return "\n\n".join(["Ours and the peer in turn, A B A B, medians of ratios.", body, told(result["machine"], "tune_memory", name)])


def bigger_steps(results: Results) -> list[str]:
    """A training step of a model that does not fit: what it is, a table, and where it comes from."""
    titles = {"d-lora": "NF4 and LoRA", "d-qst": "NF4 and QST", "d-soup": "NF4 and LoRA, one sequence"}
    rows, sources = [], []
    for part, title in titles.items():
        result = results.get(part)
        if result is None or not result["summary"].get("pairs"):
            rows.append([f"({part}) {title}", ABSENT, *[""] * 6])
            continue
        found, settings, limit = result["summary"], result["settings"], result["runs"][0]["cgroup"]["limit_bytes"]
        peer = f"{settings['peer']}{', without a limit' if settings.get('peer_without_limit') else ''}"
        rows.append(
            [
                f"({part}) {title}",
                f"{settings['batch']} × {settings['length']}",
                f"{show_seconds(found['seconds_per_step'])} ({show_seconds(found['predicted_seconds_per_step'])})",
                f"{show_bytes(int(found['process_peak_bytes']))} of {show_bytes(limit)}",
                f"{peer}: {show_seconds(found['peer_seconds_per_step'])}",
                show_bytes(int(found["peer_peak_bytes"])),
                times(found["speedup"]),
                yes(not found["over_budget"]),
            ]
        )
        sources.append(told(result["machine"], "bigger_than_memory", part))
    intro = "A training step of the same 2.2 GB, base on disk, in 1.5 GiB for the whole process under the kernel's limit."
    return [intro, table("case|tokens|ours a step (planned)|process|peer a step|its process|faster:|kept", rows), *sources]


SOUP = {"tune-8b": "3.3 GiB", "tune-70b": "7.4 GiB (72B)"}
"""Peaks that Soup publishes, by the beginning of a job's name; an H100, one sequence of 512 tokens, by nvidia-smi."""


def gpu_steps(results: Results) -> list[str]:
    """Training steps on a GPU."""
    rows, sources = [], []
    for name, whole in results.items():
        result, settings = whole.get("result", {}), whole.get("settings", {})
        if not name.startswith("tune-") or "seconds_per_step" not in result:
            continue
        soup = next((size for begin, size in SOUP.items() if name.startswith(begin)), "-")
        tokens = settings["batch"] * settings["tokens"] / result["seconds_per_step"]
        rows.append(
            [
                name,
                f"{settings['batch']} × {settings['tokens']}",
                settings["gpu"],
                show_bytes(result["predicted_peak_bytes"]) if "predicted_peak_bytes" in result else "-",
                show_bytes(result["measured_peak_bytes"]),
                percent(result["deviation"], 2) if "deviation" in result else "-",
                show_seconds(result["seconds_per_step"]),
                f"{tokens:.0f}",
                times(result.get("over_floor")),
                soup,
            ]
        )
        sources.append(told(whole["machine"], "gpu", name))
    header = "training step|tokens|budget:|promised:|measured:|off:|a step:|tokens/s:|over the floor:|Soup publishes:"
    return [table(header, rows), *sources] if rows else [f"Training steps: {ABSENT}."]


def tune_quality(results: Results) -> str:
    """Held-out losses of what was tuned: QST beside LoRA, and DyLoRA cut at each rank beside a LoRA of that rank."""
    found = {model: results[model] for model in ("stories260k", "demo") if model in results}
    if not found:
        return ABSENT
    beside, cuts = [], []
    for model, result in found.items():
        for task, said in result["summary"].items():
            beside += [[model, task, *_quality_row(said, ours)] for ours in said["methods"] if ours.startswith("side-")]
            for run, longer in {"dylora": 1, "dylora-low": 1, **result["settings"]["longer"]}.items():
                cut = [said["over_lora"].get(f"{run}-{rank}", {}) for rank in result["settings"]["ranks"]]
                if any(cut):
                    seeds = str(max(len(over.get("seeds", [])) for over in cut))
                    ways = "papers'" if "low" not in run else "`scale=largest,slower=0.5,draw=low`"
                    cuts.append([model, task, ways, f"× {longer}", seeds, *(percent(over["mean"] - 1 if over else None) for over in cut)])
    intro = (
        "Mean held-out loss in nats a token over the seeds, ± their standard deviation; equal steps on equal batches, rates from a "
        "few tries on a validation part. *Gain*: QST's way down from the untuned model, as a share of LoRA's."
    )
    parts = [intro, table("model|task|untuned:|LoRA, rank 16:|reduction:|seeds:|QST:|QST over LoRA:|within 3 %|gain:|full tuning:", beside)]
    if cuts:
        ranks = next(iter(found.values()))["settings"]["ranks"]
        parts += [
            "Loss of one DyLoRA run, cut at each rank, over that of a LoRA trained at the rank. *Steps*: in multiples of those of one such "
            "LoRA. At × 1 the run has as many as each LoRA, so that each rank gets a share of them; at × 6 as many as the six LoRA "
            "together, in whose place it stands:"
        ]
        parts += [
            table("model|task|settings|steps:|seeds:|" + "|".join(f"{rank}:" for rank in ranks), cuts),
            f"![loss by rank]({TUNE_FIGURE})",
        ]
    return "\n\n".join([*parts, *(told(result["machine"], "tune_quality", model) for model, result in found.items())])


def _quality_row(said: dict[str, Any], ours: str) -> list[str]:
    losses = {
        name: f"{way['mean']:.3f}" + (f" ± {way['spread']:.3f}" if len(way["seeds"]) > 1 else "") for name, way in said["methods"].items()
    }
    over, gain = said["over_lora"].get(ours, {}), said.get("share_of_gain", {}).get(ours)
    untuned, lora, full = (losses.get(name, ABSENT) for name in ("base", "lora-16", "full"))
    ratio = percent(over["mean"] - 1 if over else None)
    reduction, share = ours.removeprefix("side-").replace("-base", ", first a copy of the base"), ABSENT if gain is None else f"{gain:.0%}"
    seeds = str(len(said["methods"][ours]["seeds"]))
    return [untuned.partition(" ±")[0], lora, reduction, seeds, losses[ours], ratio, yes(over.get("kept")), share, full]
