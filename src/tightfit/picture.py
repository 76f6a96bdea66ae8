"""Picture: the schedule of a placement as devices by time, with each device's memory below. Drawn by matplotlib, where it is installed."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tightfit.terms.errors import TightfitError
from tightfit.terms.placement import PlaceReport
from tightfit.terms.units import show_bytes, show_seconds

FORMATS = (".svg", ".png", ".pdf")
_MANY = 1000  # operators; their bars are too thin for a line between them
_FORWARD, _BACKWARD, _MOVED, _HELD, _LIMIT = "#4c72b0", "#55a868", "#dd8452", "#8c8c8c", "#c44e52"


def refuse_picture(file: str) -> None:
    """Raise `TightfitError` for a kind of file that is no picture, and where matplotlib is missing."""
    if _format(file) not in FORMATS:
        raise TightfitError(f"`{file}` is no picture", hint=f"name a file that ends in {', '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise TightfitError("pictures need matplotlib", hint="`pip install tightfit[plot]`")


def draw_schedule(report: PlaceReport, file: str) -> None:
    """Write the picture to `file`, whole or not at all. Raises `TightfitError` where that cannot be."""
    refuse_picture(file)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context({"svg.hashsalt": "tightfit", "text.parse_math": False}):  # a `$` in a name is a dollar
        figure = _drawn(report, plt)
        partial = f"{file}.{os.getpid()}.partial"
        try:
            figure.savefig(partial, format=_format(file)[1:], metadata={"Date": None} if _format(file) == ".svg" else None)
            os.replace(partial, file)
        except OSError as error:
            raise TightfitError(f"cannot write `{file}`: {error.strerror}") from error
        finally:
            plt.close(figure)
            if os.path.exists(partial):
                os.unlink(partial)


def _format(file: str) -> str:
    return Path(file).suffix.lower()


def _drawn(report: PlaceReport, plt: Any) -> Any:
    count = len(report.cluster.devices)
    figure, (above, below) = plt.subplots(2, 1, figsize=(10, 1.8 + 0.8 * count), sharex=True, layout="constrained")
    unit = 1e3 if report.schedule.makespan < 1 else 1.0
    _time(above, report, unit)
    _memory(below, report, unit)
    below.set_xlabel("milliseconds" if unit > 1 else "seconds")
    told = {"makespan": "a step in {}", "throughput": "a sample every {}"}[report.placed.objective]
    figure.suptitle(
        f"{report.graph.name}: {len(report.graph.operators)} operators, {told.format(show_seconds(report.placed.seconds))}, "
        f"by {report.placed.placement.by}, {report.placed.standing}",
        fontsize=10,
    )
    return figure


def _time(axes: Any, report: PlaceReport, unit: float) -> None:
    """Above each device's line what it runs, below it what it receives."""
    kinds = {"forward": (False, _FORWARD), "backward": (True, _BACKWARD)}
    device_of = report.placed.placement.device_of
    seam = 0.2 if len(report.graph.operators) < _MANY else 0.0
    for name, (backward, color) in kinds.items():
        for device in range(len(report.cluster.devices)):
            bars = [
                (report.schedule.start[at] * unit, (report.schedule.end[at] - report.schedule.start[at]) * unit)
                for at, operator in enumerate(report.graph.operators)
                if device_of[at] == device and operator.backward == backward
            ]
            axes.broken_barh(bars, (device - 0.38, 0.5), facecolors=color, edgecolors="white", linewidth=seam)
        if any(operator.backward == backward for operator in report.graph.operators):
            axes.bar([0], [0], color=color, label=name)
    for move in report.schedule.transfers:
        axes.broken_barh([(move.start * unit, (move.end - move.start) * unit)], (move.target + 0.16, 0.16), facecolors=_MOVED)
    if report.schedule.transfers:
        axes.bar([0], [0], color=_MOVED, label="receives")
    axes.set_yticks(range(len(report.cluster.devices)), [device.name for device in report.cluster.devices])
    axes.set_ylim(len(report.cluster.devices) - 0.5, -0.5)
    axes.set_xlim(0, report.schedule.makespan * unit or 1)
    axes.legend(ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _memory(axes: Any, report: PlaceReport, unit: float) -> None:
    """Each device's memory over time, as a share of what it has, between its line and the next one."""
    for number, (device, steps) in enumerate(zip(report.cluster.devices, report.schedule.memory, strict=True)):
        times = [time * unit for time, _ in steps] + [report.schedule.makespan * unit]
        shares = [held / device.memory_bytes for _, held in steps]
        floor = number + 0.4
        axes.fill_between(times, floor, [floor - 0.8 * share for share in (*shares, shares[-1])], step="post", color=_HELD, linewidth=0)
        axes.axhline(floor - 0.8, color=_LIMIT, linestyle="--", linewidth=0.8)
        peak = report.placed.peak_bytes[number]
        told = f"{show_bytes(peak)} of {show_bytes(device.memory_bytes)}"
        axes.text(1.005, floor - 0.4, told, fontsize=7, va="center", transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(report.cluster.devices)), [device.name for device in report.cluster.devices])
    axes.set_ylim(len(report.cluster.devices) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
