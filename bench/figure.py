"""Figure: promised against measured bytes of fits_as_promised, one point a run, with a band of 5 % around the promise."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.lines import Line2D

matplotlib.use("Agg")
from matplotlib import pyplot

MIB = 1024**2
BAND = 0.05
COLORS = {"generate": "#2a6fbb", "tune": "#c0392b", "embed": "#2e8b57"}
MARKERS = {"none": "o", "int8": "s", "nf4": "D", "recompute": "^", "lora": "P", "side": "X", "offload": "v"}
INK, PALE = "#333333", "#999999"


def way_of(row: dict[str, Any]) -> str:
    """What the figure calls the row's technique; streaming wins over an adapter, and that over what stands beside it."""
    if row["resident"] != 1:
        return "offload"
    return next((name for name in reversed(MARKERS) if name in row["techniques"]), "none")


def asked(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the techniques that were asked for by name, not those that the plan added."""
    return row | {"techniques": [name for name in row["techniques"] if name != "offload"]}


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Write the figure; nothing when there is nothing to show."""
    rows = [asked(row) for row in rows if "error" in row]
    if not rows:
        return
    pyplot.rcParams.update({"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK})
    picture, axes = pyplot.subplots(figsize=(6.4, 5.2), dpi=150)
    sizes = [row[name] / MIB for row in rows for name in ("predicted_peak_bytes", "measured_peak_bytes")]
    ends = [min(sizes) / 1.4, max(sizes) * 1.4]
    axes.fill_between(ends, [end * (1 - BAND) for end in ends], [end * (1 + BAND) for end in ends], color="#e8e8e8", linewidth=0)
    axes.plot(ends, ends, color=PALE, linewidth=0.8)
    for row in rows:
        point = row["predicted_peak_bytes"] / MIB, row["measured_peak_bytes"] / MIB
        style = {"marker": MARKERS[way_of(row)], "facecolors": "none", "edgecolors": COLORS[row["task"]], "linewidths": 1.1}
        axes.scatter(*point, s=34, **style)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    axes.set_xlabel("promised before, MiB of tensors at the peak")
    axes.set_ylabel("measured by the allocator, MiB")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_major_locator(matplotlib.ticker.LogLocator(base=10, subs=(1, 2, 5)))
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    _legend(axes, rows)
    picture.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(file, metadata={"Software": None})
    pyplot.close(picture)


def _legend(axes: Any, rows: list[dict[str, Any]]) -> None:
    tasks = [Line2D([], [], marker="o", linestyle="", color=color, label=task) for task, color in COLORS.items()]
    seen = {way_of(row) for row in rows}
    ways = [
        Line2D([], [], marker=marker, linestyle="", color=PALE, markerfacecolor="none", label="as stored" if way == "none" else way)
        for way, marker in MARKERS.items()
        if way in seen
    ]
    band = Line2D([], [], linewidth=7, color="#e8e8e8", label=f"within {BAND:.0%}")
    axes.legend(handles=[*tasks, *ways, band], frameon=False, loc="upper left")
