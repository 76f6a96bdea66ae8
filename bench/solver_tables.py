"""Solver tables: what the page of benchmarks shows of the speed of solvers."""

import statistics
from typing import Any

from cells import ABSENT, Results, table, told, yes

from tightfit.terms.units import show_bytes, show_seconds

Rows = list[dict[str, Any]]
TURNS = ("refits", "descents", "errors")
"""Stages of a solve after its walk."""


def quantize_speed(results: Results) -> str:
    """Weights a second, peaks, the search over ranges; and large models on a GPU."""
    parts = [part for device in results for part in _layers(device, results[device])]
    blocks = [_block(row) for result in results.values() for row in _rows(result, "block")]
    header = "a block on a GPU|a block:|weights, M/s:|Hessians:|solving:|peak:|promised:|whole model:|as wished"
    parts.append(table(header, blocks) if blocks else f"Blocks of Llama-2-7B and 70B on a GPU under a cap of 32 GiB: {ABSENT}.")
    return "\n\n".join([*parts, *(told(result["machine"], "quantize_speed", device) for device, result in results.items())])


def _rows(result: dict[str, Any], kind: str) -> Rows:
    return [row for row in result["rows"].values() if row["kind"] == kind and "error" not in row]


def _layers(device: str, result: dict[str, Any]) -> list[str]:
    """What was measured of single layers on a device."""
    solves, peaks, searches = (_rows(result, kind) for kind in ("solve", "peak", "search"))
    return [
        *(_solves(device, result["settings"], solves) if solves else []),
        *(_peaks(peaks) if peaks else []),
        *(_searches(searches) if searches else []),
    ]


def _solves(device: str, settings: dict[str, Any], rows: Rows) -> list[str]:
    """A line a solver: speed by layer, and where the time goes in the mean."""
    lines, shapes = [], [(layer["rows"], layer["columns"]) for layer in settings["layers"]]
    for solver in settings["solvers"]:
        own = {(row["rows"], row["columns"]): row for row in rows if row["solver"] == solver}
        speeds = [f"{own[shape]['million_weights_per_busy_second']:.3g}" if shape in own else "-" for shape in shapes]
        lines.append([f"`{solver}`", *speeds, *(_shares(list(own.values())) if own else [""] * 4)])
    cut = any(row["solved_rows"] < row["rows"] for row in rows)
    some = " Of large layers some rows are solved, and all are reckoned from them." if cut else ""
    slower = statistics.median(row["seconds"] / row["busy_seconds"] for row in rows)
    note = f" By the wall the median row took {slower:.2f} times as long." if device == "cpu" else ""
    titles = [f"{device}, million weights a second|", *(f"{rows}×{columns}:|" for rows, columns in shapes)]
    intro = (
        "Random layers of rows × columns, whose inputs have outliers and directions in common, by the clock of the one thread that "
        f"solves them.{note}{some} Shares are means over the layers; *turns* are the refits of a grid and the descents over its codes."
    )
    return [intro, table("".join([*titles, "factor:|grid:|walk:|turns:"]), lines)]


def _shares(rows: Rows) -> list[str]:
    """Of the Hessian's factor, the grid, the walk, and the turns after it."""
    mean = {name: statistics.mean(row["share"].get(name, 0.0) for row in rows) for name in ("factor", "grid", "walk", *TURNS)}
    return [f"{share:.0%}" if share >= 0.005 else "" for share in (mean["factor"], mean["grid"], mean["walk"], sum(map(mean.get, TURNS)))]


def _peaks(rows: Rows) -> list[str]:
    """Bytes that a solve takes beside what it is given."""
    lines = [
        [f"`{row['solver']}`", f"{row['rows']}×{row['columns']}", show_bytes(row["beyond_bytes"]), show_bytes(row["peak_bytes"]),
         show_bytes(row["promised_bytes"]), yes(row["kept"])]
        for row in rows
    ]  # fmt: skip
    return [
        "Bytes at the peak of a solve, by the allocator's own records:",
        table("solver|layer|by itself:|with weight and Hessian:|promised:|kept", lines),
    ]


def _searches(rows: Rows) -> list[str]:
    """The search over ranges."""
    lines = [
        [
            f"{row['group']} columns" if row["group"] else "a row",
            show_seconds(row["busy_seconds"]),
            f"{row['plain_seconds'] / 3600:,.1f} h",
            f"{row['speedup']:,.0f}×",
            f"{row['together_seconds'] / 3600:,.1f} h",
            f"{row['speedup_over_together']:,.0f}×",
            f"{row['error_over_least']:.4f}",
            yes(row["kept"]),
        ]
        for row in rows
    ]
    intro = (
        f"The range of an affine grid in a layer of 2048 × 2048, of {rows[0]['candidates']:,} candidates. The plain loop tries all, row by "
        "row; its time is reckoned from a few rows and candidates. *Error*: the weighted error where ours ends over the least of all "
        "candidates, for a few rows; ours tries ranges that are none of those (scales of 16 bits), and may end a little below."
    )
    header = "range for|ours:|plain loop:|faster:|loop, all rows at once:|faster:|error:|50 times or more"
    return [intro, table(header, lines)]


def _block(row: dict[str, Any]) -> list[str]:
    share = row["share"]
    solving = sum(share[name] for name in ("solving", "factor", "grid", "walk", *TURNS))
    return [
        row["model"],
        show_seconds(row["seconds_per_block"]),
        f"{row['million_weights_per_second']:.1f}",
        f"{share['hessians']:.0%}",
        f"{solving:.0%}",
        show_bytes(row["peak_bytes"]),
        show_bytes(row["predicted_bytes"]),
        f"{row['hours']:.2f} h",
        yes(row["kept"]),
    ]
