"""Cells: how the page of benchmarks shows tables, ratios, and where a result comes from. It knows no question."""

from collections.abc import Iterable
from typing import Any

from tightfit.terms.units import show_bytes

ABSENT = "not yet measured"
Results = dict[str, dict[str, Any]]
"""What a question has measured, by the name of the file."""


def table(header: str, rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table. `header`: titles between bars, with a colon after those of numbers."""
    titles = header.split("|")
    lines = [[title.rstrip(":") for title in titles], ["--:" if title.endswith(":") else "---" for title in titles], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def told(machine: dict[str, Any], question: str, name: str) -> str:
    """Where a result comes from, in one line."""
    versions, load = machine["versions"], machine["load_average"][0]
    cores = f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    where = f"{cores}, {show_bytes(machine['ram_bytes'])} of RAM, load {load:.1f} at the start"
    what = f"torch {versions['torch']}, transformers {versions['transformers']}, tightfit {versions['tightfit']}"
    return f"[{question}/{name}.json](../bench/{question}/results/{name}.json): {machine['started'][:10]}, {where}; {what}."


def percent(value: float | None, digits: int = 1) -> str:
    """A share with its sign."""
    return ABSENT if value is None else f"{value:+.{digits}%}"


def times(value: float | None) -> str:
    """A ratio."""
    return "-" if value is None else f"{value:.2f}×"


def yes(kept: bool | None) -> str:
    """Whether a word was kept."""
    return {True: "yes", False: "**no**", None: "-"}[kept]
