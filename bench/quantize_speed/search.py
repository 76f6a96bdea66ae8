"""Search: ranges of affine grids, by ours and by the loop that LeanQuant describes: every pair of shrunken ends, in plain torch."""

import itertools
import random
import time
from typing import Any

import torch
from layers import hessian_for, weight_for
from stages import clock_of
from torch import Tensor

from tightfit.formats.ranges import range_grid
from tightfit.techniques._columns import factor, settle


def plain_error(rows: Tensor, importance: Tensor, scale: Any, zero: Any, bits: int) -> Tensor:
    """`Σ a (quantized - w)²`.  # rows (..., n), importance (n,) → (...)"""
    codes = (torch.round(rows / scale) + zero).clamp(0, 2**bits - 1)
    return (importance * (scale * (codes - zero) - rows).square()).sum(dim=-1)


def plain_loop(row: Tensor, importance: Tensor, bits: int, steps: int, pairs: list[tuple[int, int]]) -> tuple[float, float]:
    """Scale and zero of the best of the `pairs` for one row, one pair after the other (LeanQuant, affine grids).  # row (n,)"""
    low, high = row.min().item(), row.max().item()
    unit, least, found = (high - low) / steps, float("inf"), (1.0, 0.0)
    for u, v in pairs:
        scale = ((high - v * unit) - (low + u * unit)) / (2**bits - 1)
        zero = round(-(low + u * unit) / scale)
        error = plain_error(row, importance, scale, zero, bits).item()
        if error < least:
            least, found = error, (scale, zero)
    return found


def together(rows: Tensor, importance: Tensor, bits: int, steps: int, pairs: list[tuple[int, int]]) -> Tensor:
    """The same loop with all rows at once: the errors of the best.  # rows (r, n) → (r,)"""
    low, high = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    unit, least = (high - low) / steps, rows.new_full((len(rows),), float("inf"))
    for u, v in pairs:
        scale = ((high - v * unit) - (low + u * unit)) / (2**bits - 1)
        zero = torch.round(-(low + u * unit) / scale)
        least = torch.minimum(least, plain_error(rows, importance, scale, zero, bits))
    return least


def least_error(row: Tensor, importance: Tensor, bits: int, steps: int) -> float:
    """Of all pairs, many at once: what the loop would end at.  # row (n,)"""
    low, high = row.min(), row.max()
    unit, ends = (high - low) / steps, torch.arange(steps // 2, device=row.device)
    best = float("inf")
    for u in ends.split(max(1, (1 << 22) // (len(row) * len(ends)))):
        begin, end = low + u[:, None] * unit, high - ends * unit  # (some, 1), (steps / 2,)
        scale = ((end - begin) / (2**bits - 1))[..., None]
        zero = torch.round(-begin[..., None] / scale)
        best = min(best, plain_error(row, importance, scale, zero, bits).min().item())
    return best


def search_row(group: int, settings: dict[str, Any], device: str) -> dict[str, Any]:
    """Seconds of both for a whole layer, and how much above the loop's error ours ends."""
    clock, bits, steps = clock_of(device), settings["bits"], settings["steps"]
    weight, hessian = (make(settings["columns"], device) for make in (lambda n, d: weight_for(settings["rows"], n, d), hessian_for))
    importance = factor(settle(weight, hessian), 0.1, True).importance(2.0)
    groups = settings["columns"] // group if group else 1
    took, wall = clock(), time.perf_counter()
    grid = range_grid(weight, bits, groups, searched=True, importance=importance)
    ours, wall = clock() - took, time.perf_counter() - wall
    parts, weights = weight.view(weight.shape[0] * groups, -1), importance.view(groups, -1)
    candidates = (steps // 2) ** 2
    pairs = random.Random(0).sample(list(itertools.product(range(steps // 2), repeat=2)), settings["plain_candidates"])
    took = clock()
    for at in range(settings["plain_rows"]):
        plain_loop(parts[at], weights[at % groups], bits, steps, pairs)
    plain = (clock() - took) / settings["plain_rows"] / len(pairs) * candidates * len(parts)
    spread = weights.repeat(len(weight), 1)  # (rows · groups, n)
    tried = pairs[: settings["together"]]
    took = clock()
    together(parts, spread, bits, steps, tried)
    joined = (clock() - took) / len(tried) * candidates
    scale, zero = grid.scale.view(-1, 1), grid.zero.view(-1, 1)
    reached = plain_error(parts, spread, scale, zero, bits)
    checked = settings["checked"][str(group)]
    least = [least_error(parts[at], spread[at], bits, steps) for at in range(checked)]
    return {
        "seconds": wall,
        "busy_seconds": ours,
        "plain_seconds": plain,
        "together_seconds": joined,
        "speedup": plain / ours,
        "speedup_over_together": joined / ours,
        "checked": checked,
        "error_over_least": reached[:checked].sum().item() / sum(least),
        "kept": plain / ours >= settings["least_speedup"],
    }
