"""Layers: one random layer solved: its seconds by stage, and the bytes at its peak."""

import functools
import time
from typing import Any

import torch
from stages import clock_of, solver_parts, watched
from torch import Tensor

from tightfit import catalog
from tightfit.contracts import Solves
from tightfit.rehearse.allocator import allocator_peak


def solver_of(text: str) -> Solves:
    """The technique that the command line would make of it."""
    made = catalog.make(*catalog.parse(text))
    assert isinstance(made, Solves)
    return made


@functools.lru_cache(maxsize=1)
def hessian_for(columns: int, device: str) -> Tensor:
    """The mean of `2 x xᵀ` for inputs like those of a trained model: `x = d · (z + B u)`, with a few directions in common, unlike spreads,
    and one channel in a hundred ten times as strong.  # (columns, columns) float32
    """
    draw = torch.Generator().manual_seed(columns)
    common = torch.randn(columns, 64, generator=draw) / 8
    spread = (0.5 * torch.randn(columns, generator=draw)).exp()
    spread[torch.randperm(columns, generator=draw)[: max(1, columns // 100)]] *= 10
    hessian = torch.addmm(torch.eye(columns), common, common.t())
    return (2 * spread[:, None] * hessian * spread).to(device)


def weight_for(rows: int, columns: int, device: str) -> Tensor:
    """# (rows, columns) float32"""
    return (0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))).to(device)


def warm_up(device: str) -> None:
    """What only the first calls take."""
    for solver in ("rtn", "gptq:search=mse,group=128", "lean", "lean:grid=affine"):
        solver_of(solver).solve(weight_for(16, 256, device), hessian_for(256, device))


SHORT = 0.5
"""Seconds of the thread below which a solve is repeated, for the fastest of five: a row of `rtn` takes milliseconds."""


def solve_row(text: str, rows: int, columns: int, solved: int, device: str) -> dict[str, Any]:
    """Seconds of a whole layer, of which `solved` rows were solved. `seconds` are the wall's, `busy_seconds` those of the thread."""
    solver, weight, hessian = solver_of(text), weight_for(solved, columns, device), hessian_for(columns, device)
    busy, wall, spent = _once(solver, weight, hessian, device)
    if busy < SHORT:
        busy, wall, spent = min((_once(solver, weight, hessian, device) for _ in range(5)), key=lambda run: run[0])
    spent["rest"] = busy - sum(spent.values())
    whole = {name: seconds * (1 if name == "factor" else rows / solved) for name, seconds in spent.items()}
    busy_seconds = sum(whole.values())
    seconds = wall * busy_seconds / busy
    return {
        "solved_rows": solved,
        "seconds": seconds,
        "busy_seconds": busy_seconds,
        "million_weights_per_second": rows * columns / seconds / 1e6,
        "million_weights_per_busy_second": rows * columns / busy_seconds / 1e6,
        "share": {name: spent / busy_seconds for name, spent in whole.items()},
    }


def _once(solver: Solves, weight: Tensor, hessian: Tensor, device: str) -> tuple[float, float, dict[str, float]]:
    """Seconds of the thread, of the wall, and of the thread by stage."""
    clock = clock_of(device)
    with watched(solver_parts(), clock) as stages:
        began, busy = time.perf_counter(), clock()
        solver.solve(weight, hessian)
        busy = clock() - busy
        return busy, time.perf_counter() - began, dict(stages.seconds)


def peak_row(text: str, rows: int, columns: int, device: str) -> dict[str, Any]:
    """Bytes of a solve at its highest moment, with the float32 weight and the Hessian that it is given, beside the promise for all that."""
    solver, weight, hessian = solver_of(text), weight_for(rows, columns, device), hessian_for(columns, device)
    given = weight.nbytes + (hessian.nbytes if solver.needs_inputs() else 0)
    if device == "cpu":
        beyond = allocator_peak(lambda: solver.solve(weight, hessian))
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        solver.solve(weight, hessian)
        beyond = torch.cuda.max_memory_allocated() - before
    promised = solver.solve_bytes(rows, columns)
    return {"promised_bytes": promised, "beyond_bytes": beyond, "peak_bytes": given + beyond, "kept": given + beyond <= promised}
