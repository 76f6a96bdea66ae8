"""Figure: the gap to the dense model over the bits of a weight, tables included, a line a method.

python bench/quantize_quality/figure.py        (results/*.json → docs/figures/quantize_quality.png)
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).resolve().parent
FIGURE = HERE.parents[1] / "docs" / "figures" / "quantize_quality.png"
MODELS = ("stories260k", "demo", "minilm")
INK = "#333333"
STYLES = {
    "rtn": ("round to nearest", "#bbbbbb", "o"),
    "gptq": ("GPTQ", "#d98880", "s"),
    "gptq-strong": ("GPTQ, grouped and searched", "#a93226", "D"),
    "lean-affine": ("lean, affine", "#7fb3d5", "^"),
    "lean-affine-grouped": ("lean, affine, grouped", "#5499c7", "v"),
    "lean": ("lean", "#1a5276", "o"),
    "nf4": ("NF4, scales in 8 bits", "#2e8b57", "*"),
    "nf4-plain": ("NF4", "#82c99d", "*"),
    "hqq": ("HQQ", "#ca6f1e", "x"),
    "k-quants": ("k-quants", "#7d3c98", "P"),
}


def points(summary: dict[str, Any], method: str) -> list[tuple[float, float]]:
    """Bits per weight and the mean gap, from few bits to many."""
    ways = [summary[bits][method] for bits in summary if bits.isdigit() and method in summary[bits]]
    return sorted((way["bits_per_weight"], way["gap"]) for way in ways)


def draw(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Write the figure; nothing when there is nothing to show."""
    if not results:
        return
    pyplot.rcParams.update({"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK})
    picture, grid = pyplot.subplots(1, len(results), figsize=(3.8 * len(results) + 0.4, 3.8), dpi=150, squeeze=False)
    for axes, (model, result) in zip(grid[0], results.items(), strict=True):
        for method, (label, color, marker) in STYLES.items():
            found = points(result["summary"], method)
            if found:
                axes.plot(*zip(*found, strict=True), color=color, marker=marker, markersize=4, linewidth=1.1, label=label)
        axes.set(yscale="log", xlabel="bits a weight", title=model)
        axes.set_ylabel("1 - cosine" if "cosine" in result["dense"] else "nats a token above dense")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(frameon=False, fontsize=7)
    picture.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(file, metadata={"Software": None})
    pyplot.close(picture)


def main() -> None:
    files = [HERE / "results" / f"{model}.json" for model in MODELS]
    draw({file.stem: json.loads(file.read_text()) for file in files if file.exists()}, FIGURE)


if __name__ == "__main__":
    main()
