"""Ranges: from where to where the evenly spaced values of a row or group reach: its least and greatest weight, or what a search finds."""

import torch
from torch import Tensor

from tightfit.formats.grids import FITTED, AffineGrid, Ranked, stored


def min_max(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero that reach from the least weight to the greatest, nought between them.  # (rows, n) → (rows,), (rows,)"""
    return _scale_and_zero(rows.amin(dim=1).float(), rows.amax(dim=1).float(), bits)


def _scale_and_zero(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As they are stored; nought lies on the grid. A row of zeros has the scale 1."""
    low, high, top = low.clamp(max=0), high.clamp(min=0), 2**bits - 1
    scale = (high - low) / top
    scale = stored(torch.where(scale > 0, scale, torch.ones_like(scale)))
    return scale, (-low / scale).round().clamp(0, top)


def range_grid(weight: Tensor, bits: int, groups: int, searched: bool, importance: Tensor | None = None) -> AffineGrid:
    """A grid a group from its least to its greatest weight, or over the range that the search finds.

    # weight (rows, columns), importance (columns,)
    """
    rows, columns = weight.shape
    parts = weight.reshape(rows * groups, -1)
    if searched:
        own = None if importance is None else importance.view(1, groups, -1).expand(rows, -1, -1).reshape(rows * groups, -1)
        scale, zero = search_range(parts, bits, own)
    else:
        scale, zero = min_max(parts, bits)
    return AffineGrid(scale.view(rows, groups), zero.view(rows, groups), bits, columns)


STEPS = 2048
"""Into which the range is cut by the search: LeanQuant's T."""

_COARSE = 128
"""Steps between the first candidates: 8 each way. With 64 twice the time goes for errors at most 0.2 % less."""


def search_range(rows: Tensor, bits: int, importance: Tensor | None = None, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Scale and zero of least weighted error over ranges that leave out up to half at either end (LeanQuant, affine grids).

    The paper tries all `(steps / 2)²` pairs. Here a coarse net comes first and then the eight neighbours at half the distance, until the
    paper's step is reached: some 120 candidates, each of which costs 2^bits look-ups in sorted weights.
    # rows (rows, n), importance (n,) or (rows, n) → (rows,), (rows,)
    """
    step, found = max(1, FITTED // max(rows.shape[1], 2**bits)), []
    for at in range(0, len(rows), step):
        own = importance[at : at + step] if importance is not None and importance.dim() == 2 else importance
        found.append(_search_range(Ranked.of(rows[at : at + step], own), bits, steps))
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _search_range(ranked: Ranked, bits: int, steps: int) -> tuple[Tensor, Tensor]:
    low, high = ranked.values[:, 0].clamp(max=0), ranked.values[:, -1].clamp(min=0)
    unit = (high - low) / steps
    cut = [torch.zeros_like(low), torch.zeros_like(low)]  # steps left out at the low end, and at the high
    least = torch.full_like(low, float("inf"), dtype=torch.float64)
    distance = max(1, min(_COARSE, steps // 8))
    net = range(0, steps // 2, distance)
    offsets = [(float(u), float(v)) for u in net for v in net]
    while True:
        centre = [part.clone() for part in cut]
        for offset in offsets:
            tried = [(middle + move).clamp(0, steps // 2 - 1) for middle, move in zip(centre, offset, strict=True)]
            scale, zero = _scale_and_zero(low + tried[0] * unit, high - tried[1] * unit, bits)
            error = ranked.error(scale[:, None] * (torch.arange(2**bits, device=low.device) - zero[:, None]))
            better = error < least
            least = torch.where(better, error, least)
            cut = [torch.where(better, new, old) for new, old in zip(tried, cut, strict=True)]
        if distance == 1:
            return _scale_and_zero(low + cut[0] * unit, high - cut[1] * unit, bits)
        distance = max(1, distance // 2)
        offsets = [(float(u), float(v)) for u in (-distance, 0, distance) for v in (-distance, 0, distance) if u or v]
