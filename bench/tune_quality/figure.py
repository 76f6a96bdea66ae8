"""Figure: DyLoRA runs cut at each rank beside a LoRA trained at that rank: held-out loss, mean and every seed.

python bench/tune_quality/figure.py        (results/*.json → docs/figures/tune_quality.png)
"""

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.lines import Line2D

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).resolve().parent
FIGURE = HERE.parents[1] / "docs" / "figures" / "tune_quality.png"
INK, PALE = "#333333", "#999999"
LORA, SIDE = "#2a6fbb", "#2e8b57"
KINDS = (
    ("lora", "LoRA trained at the rank", LORA, "o"),
    ("dylora", "one DyLoRA run, cut at it", "#d98880", "s"),
    ("dylora-low", "its rows weighed alike, low ranks first", "#a93226", "D"),
    ("dylora-6x", "one of 6 times the steps", "#f0b46a", "^"),
    ("dylora-low-6x", "both", "#ca6f1e", "v"),
)
BAND = 0.03


def losses_of(rows: list[dict[str, Any]], task: str) -> dict[str, list[float]]:
    """Held-out losses of a task by method, one a seed; `dylora-4` is the one run cut at rank 4."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["task"] == task:
            for method, loss in {row["method"]: row["held_out"], **_cuts(row)}.items():
                found.setdefault(method, []).append(loss)
    return found


def _cuts(row: dict[str, Any]) -> dict[str, float]:
    return {f"{row['method']}-{rank}": loss for rank, loss in row.get("by_rank", {}).items()}


def panels_of(results: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, list[float]], list[int]]]:
    """Title, losses and ranks of each panel: every model and task with a DyLoRA run."""
    found = []
    for model, result in results.items():
        for task in dict.fromkeys(row["task"] for row in result["rows"]):
            losses = losses_of(result["rows"], task)
            ranks = [rank for rank in result["settings"]["ranks"] if f"dylora-{rank}" in losses and f"lora-{rank}" in losses]
            if ranks:
                found.append((f"{model}, {task}", losses, ranks))
    return found


def draw(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Write the figure; nothing when there is nothing to show."""
    panels = panels_of(results)
    if not panels:
        return
    pyplot.rcParams.update({"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK})
    picture, grid = pyplot.subplots(1, len(panels), figsize=(3.6 * len(panels) + 0.4, 4.2), dpi=150, squeeze=False)
    for axes, (title, losses, ranks) in zip(grid[0], panels, strict=True):
        panel(axes, losses, ranks)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("rank")
    grid[0][0].set_ylabel("held-out loss, nats a token")
    _legend(picture)
    picture.tight_layout(rect=(0, 0.14, 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(file, metadata={"Software": None})
    pyplot.close(picture)


def panel(axes: Any, losses: dict[str, list[float]], ranks: list[int]) -> None:
    """One model and task: lines through the means, a point a seed, a band around LoRA, and QST and the untuned base as levels."""
    means = [statistics.mean(losses[f"lora-{rank}"]) for rank in ranks]
    axes.fill_between(ranks, [mean * (1 - BAND) for mean in means], [mean * (1 + BAND) for mean in means], color="#dddddd", linewidth=0)
    for kind, _, color, marker in KINDS:
        if f"{kind}-{ranks[0]}" not in losses:
            continue
        axes.plot(ranks, [statistics.mean(losses[f"{kind}-{rank}"]) for rank in ranks], color=color, linewidth=1.2)
        for rank in ranks:
            seen = losses[f"{kind}-{rank}"]
            axes.scatter([rank] * len(seen), seen, s=16, marker=marker, facecolors="none", edgecolors=color, linewidths=0.9)
    sides = [statistics.mean(seen) for method, seen in losses.items() if method.startswith("side-")]
    if sides:
        axes.axhline(min(sides), color=SIDE, linewidth=1.0, linestyle="--")
    axes.set(xscale="log")
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.spines[["top", "right"]].set_visible(False)


def _legend(picture: Any) -> None:
    style = {"linestyle": "-", "markerfacecolor": "none"}
    handles = [
        *(Line2D([], [], color=color, marker=marker, label=label, **style) for _, label, color, marker in KINDS),
        Line2D([], [], color=SIDE, linestyle="--", label="QST, the best of its settings"),
        Line2D([], [], color="#dddddd", linewidth=7, label=f"within {BAND:.0%} of LoRA"),
    ]
    picture.legend(handles=handles, frameon=False, fontsize=8, ncols=3, loc="lower center")


def main() -> None:
    files = [HERE / "results" / f"{model}.json" for model in ("stories260k", "demo")]
    draw({file.stem: json.loads(file.read_text()) for file in files if file.exists()}, FIGURE)


if __name__ == "__main__":
    main()
