"""Plan picture: draws `plan_picture.svg` for docs/how-it-works.md from a real plan. `python docs/figures/plan_picture.py`.

It plans for an unprobed machine, so that the picture is the same wherever it is drawn.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "tightfit"
import matplotlib.pyplot as plt  # noqa: E402

import tightfit  # noqa: E402
from tightfit.terms.footprint import KINDS, total  # noqa: E402
from tightfit.terms.machine import Machine  # noqa: E402
from tightfit.terms.units import GIB  # noqa: E402

COLORS = {"weights": "#4c72b0", "activations": "#55a868", "kv_cache": "#64b5cd", "workspace": "#ccb974", "overhead": "#9a9a9a"}
HOMES = {"gpu": "#4c72b0", "ram": "#dd8452", "disk": "#c44e52"}
MODEL, TOKENS, NEW_TOKENS, BATCH = "llama-2-70b", 2048, 256, 8


def draw(file: Path) -> None:
    """Memory phase by phase above, where each block rests below."""
    work = tightfit.Workload(batch=BATCH, tokens=TOKENS, new_tokens=NEW_TOKENS)
    budget = tightfit.Budget.parse(gpu="24GiB", ram="64GiB", disk="100GiB")
    plan = tightfit.plan(MODEL, work, budget, quality="near", machine=Machine())
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 5.6), height_ratios=[5, 1], layout="constrained")
    _phases(above, plan)
    _blocks(below, plan)
    figure.suptitle(
        f"{MODEL} planned with `--gpu 24GiB --ram 64GiB --quality near`: {', '.join(plan.techniques)}\n"
        f"{BATCH} prompts of {TOKENS} tokens, {NEW_TOKENS} new tokens each",
        fontsize=10,
    )
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _phases(axes: plt.Axes, plan: tightfit.Plan) -> None:
    names = [name for name in plan.phases if name != "start"]
    overhead = plan.predicted["gpu"]["overhead"]
    left = [0.0] * len(names)
    for kind in KINDS:
        sizes = [(overhead if kind == "overhead" else plan.phases[name].get(kind, 0)) / GIB for name in names]
        if any(sizes):
            axes.barh(names, sizes, left=left, color=COLORS[kind], label=kind)
            left = [before + size for before, size in zip(left, sizes, strict=True)]
    for place, end in enumerate(left):
        axes.text(end - 0.1, place, f"{end:.1f}", va="center", ha="right", fontsize=8, color="white")
    axes.axvline(plan.budget.gpu / GIB, color="black", linestyle="--", linewidth=1, label="budget")
    axes.invert_yaxis()
    axes.set_xlim(0, 26.5)
    axes.set_xlabel("GiB on the GPU at each phase's highest moment")
    axes.legend(ncols=6, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    assert max(total(plan.phases[name]) for name in names) <= plan.budget.gpu


def _blocks(axes: plt.Axes, plan: tightfit.Plan) -> None:
    shown = set()
    for position, home in enumerate(plan.residency):
        axes.bar(position, 1, width=0.9, color=HOMES[home], label=None if home in shown else f"rests on {home}")
        shown.add(home)
    axes.set_yticks([])
    axes.set_xlim(-0.6, len(plan.residency) - 0.4)
    axes.set_xlabel(f"the {len(plan.residency)} blocks by position; those that do not rest on the GPU take turns in its slots")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".svg"))
