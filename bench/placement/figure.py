"""Figure: the seconds that Baechi's three algorithms take to place more and more operators.

python bench/placement/figure.py        (results/speed.json → docs/figures/placement_speed.png)
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).resolve().parent
FIGURE = HERE.parents[1] / "docs" / "figures" / "placement_speed.png"
INK = "#333333"
KINDS = {"m_topo": ("m-TOPO", "#2e8b57", "o"), "m_etf": ("m-ETF", "#2a6fbb", "s"), "m_sct": ("m-SCT", "#a93226", "D")}


def draw(rows: dict[str, dict[str, Any]], file: Path) -> None:
    """Seconds over operators, both in powers of ten, a line an algorithm; and a line that grows as operators do."""
    pyplot.rcParams.update({"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK})
    picture, axes = pyplot.subplots(figsize=(5.2, 3.4), dpi=150)
    for kind, (label, color, marker) in KINDS.items():
        own = sorted((row["operators"], row["seconds"]) for name, row in rows.items() if name.split(" ")[0] == kind)
        axes.plot(*zip(*own, strict=True), color=color, marker=marker, markerfacecolor="none", linewidth=1.2)
        axes.annotate(label, own[-1], xytext=(7, -3), textcoords="offset points", color=color)
    sizes = sorted({row["operators"] for row in rows.values()})
    least = min(row["seconds"] for row in rows.values())
    axes.plot([sizes[0], sizes[-1]], [least / 3, least / 3 * sizes[-1] / sizes[0]], color="#999999", linewidth=0.8, linestyle=":")
    axes.annotate(
        "linear growth", (sizes[2], least / 3 * sizes[2] / sizes[0]), xytext=(6, -10), textcoords="offset points", color="#777777"
    )
    axes.set(xscale="log", yscale="log", xlabel="operators", ylabel="seconds to place, one thread")
    axes.set_xlim(sizes[0] / 1.4, sizes[-1] * 2.6)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    picture.tight_layout()
    picture.savefig(file, metadata={"Software": None})
    pyplot.close(picture)


def main() -> None:
    draw(json.loads((HERE / "results" / "speed.json").read_text())["rows"], FIGURE)


if __name__ == "__main__":
    main()
