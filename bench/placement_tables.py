"""Placement tables: what the page of benchmarks shows of placements: how far from the best, beside whom, and how long it takes."""

import statistics
from collections.abc import Iterable
from typing import Any

from cells import ABSENT, Results, percent, table, told

from tightfit.terms.units import show_seconds

Row = dict[str, Any]
BESIDE = {
    "expert": "experts' split",
    "accelerate": "accelerate",
    "pipedream chain": "PipeDream's chain",
    "balanced": "balanced",
    "greedy fill": "greedy fill",
}
"""What stands beside ours, by its name in the results."""


def placement(results: Results) -> str:
    """Both objectives, then the speed of Baechi's three."""
    parts = []
    for part, wish in (("throughput", "largest load of a pipeline's device"), ("makespan", "makespan of one step")):
        parts += [_objective(results[part], wish)] if part in results else [f"The {wish}: {ABSENT}."]
    parts.append(_speed(results["speed"]) if "speed" in results else f"How long Baechi's three take for up to 50,000 operators: {ABSENT}.")
    parts.append(_measured(results["measured"]) if "measured" in results else f"Simulated steps beside real ones: {ABSENT}.")
    return "\n\n".join([*parts, *(told(result["machine"], "placement", part) for part, result in results.items())])


def _objective(result: dict[str, Any], wish: str) -> str:
    """A sentence, and a line a graph over all its numbers of devices and memories."""
    rows = {name: row for name, row in result["rows"].items() if "error" not in row}
    placed = [row for row in rows.values() if "fault" not in row]
    gaps = [row["gap"] for row in placed]
    best = sum(row["gap"] < 2e-4 for row in placed)
    intro = (
        f"The {wish}: {len(placed)} of {len(rows)} graphs × devices × memories placed, {best} proven the best there is; at most "
        f"{statistics.median(gaps):.1%} from the best in the median, {sum(gap <= 0.05 for gap in gaps) / len(gaps):.0%} within 5 %; the "
        f"fullest device holds {max(row['simulated_over_limit'] for row in placed):.0%} of its memory. Ratios are medians of ours over "
        "theirs, where theirs fits; less is better."
    )
    maps = [row for row in placed if "accelerate" in row["others"]]
    full = sum("accelerate" in row.get("overfull", ()) or row["others"]["accelerate"] is None for row in maps)
    intro += f" accelerate's device map, which counts weights alone, exceeds the memory or leaves the GPUs in {full} of {len(maps)} cases."
    lines = []
    for graph in dict.fromkeys(name.rsplit(" ", 2)[0] for name in rows):
        own = [row for name, row in rows.items() if name.rsplit(" ", 2)[0] == graph and "fault" not in row]
        lines.append([graph, *(_graph(own) if own else ["-"] * (5 + len(BESIDE)))])
    header = "graph|operators:|placed:|gap:|worst gap:|over Baechi's best:|" + "|".join(f"over {name}:" for name in BESIDE.values())
    return f"{intro}\n\n" + table(f"{header}|slowest to place:", lines)


def _graph(rows: list[Row]) -> list[str]:
    gaps = [row["gap"] for row in rows]
    heuristics = [row["seconds"] / row["best_heuristic_seconds"] for row in rows if row.get("best_heuristic_seconds")]
    beside = [[row["over_others"][name] for row in rows if name in row["over_others"]] for name in BESIDE]
    return [
        str(rows[0]["operators"]),
        str(len(rows)),
        percent(statistics.median(gaps)),
        percent(max(gaps)),
        *(_median(ratios) for ratios in (heuristics, *beside)),
        show_seconds(max(row["place_seconds"] for row in rows)),
    ]


def _measured(result: dict[str, Any]) -> str:
    """Simulated over measured seconds, by model and way to place it; and bytes."""
    ways = list(dict.fromkeys(way for row in result["rows"].values() for way in row["ways"]))
    every = [one for row in result["rows"].values() for one in row["ways"].values()]
    held = [size / said for one in every for size, said in zip(one["held_peak_bytes"], one["simulated_peak_bytes"], strict=True) if said]
    off = statistics.median(abs(one["ratio"] - 1) for one in every)
    intro = (
        f"Simulated beside real: {len(every)} placed steps over two CPU processes; simulated over measured seconds, with operators as "
        f"profiled. The simulator is off by {off:.1%} in the median. A process held at most {max(held):.0%} of what was simulated. The "
        f"largest difference from the results and gradients of one process is {max(one['largest_error'] for one in every):g}."
    )
    lines = [
        [name, str(row["operators"]), *(f"{row['ways'][way]['ratio']:.2f}" if way in row["ways"] else "-" for way in ways)]
        for name, row in result["rows"].items()
    ]
    return f"{intro}\n\n" + table("step|operators:|" + "|".join(f"{way}:" for way in ways), lines)


def _median(ratios: Iterable[float]) -> str:
    ratios = list(ratios)
    return f"{statistics.median(ratios):.2f}" if ratios else "-"


def _speed(result: dict[str, Any]) -> str:
    """Random layered graphs: seconds by heuristic and size."""
    rows = [row | {"heuristic": name.split(" ")[0]} for name, row in result["rows"].items() if "error" not in row]
    sizes = sorted({row["operators"] for row in rows})
    lines = []
    for heuristic in dict.fromkeys(row["heuristic"] for row in rows):
        own = {row["operators"]: row["seconds"] for row in rows if row["heuristic"] == heuristic}
        lines.append([f"`{heuristic}`", *(show_seconds(own[size]) if size in own else "-" for size in sizes)])
    devices = rows[0]["devices"]
    intro = (
        f"Random layered graphs on {devices} devices, one thread. Baechi's paper (SoCC 2020, abstract) places 654 to 206,000 times as fast "
        "as learning-based placers."
    )
    return f"{intro}\n\n" + table("heuristic|" + "|".join(f"{size:,} operators:" for size in sizes), lines)
