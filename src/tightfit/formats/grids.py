"""Grids: the few values that the weights of a row may take, how they are fitted to the weights, and how codes on them are found.

Rows are independent of each other everywhere. A row's squared error on any sorted grid needs no look at its weights: they are sorted
once, sums of their moments are kept, and a grid value's share lies between two midpoints. So a round of k-means, or a candidate of a
search over ranges, costs the logarithm of the row's length.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self

import torch
from torch import Tensor

from tightfit.formats.refit import best_change

ROUNDS = 100
"""Of k-means at most; it ends when nothing moves any more."""

FITTED = 1 << 18
"""Weights that are fitted at a time: three running sums in float64 for each."""


class Grid(Protocol):
    """The values that each weight of a matrix may take. All tensors are float32 on one device."""

    def nearest(self, column: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values nearest to the weights of one column.  # (rows,) → (rows,) uint8, (rows,)"""
        ...

    def dense(self, codes: Tensor) -> Tensor:
        """The values of all codes.  # (rows, columns) uint8 → (rows, columns)"""
        ...

    def refitted(self, codes: Tensor, pull: Tensor, hessian: Tensor, enough: Tensor) -> Self:
        """The grid with the least error `(weight - dense) H (weight - dense)ᵀ` in every row for these codes, rounded as it is stored.

        # codes and pull (rows, columns), pull = (weight - dense) H on this grid; enough (rows,): how far above the least it may end
        """
        ...

    def where(self, rows: Tensor, other: Self) -> Self:
        """This grid in the `rows` that are true, the other elsewhere.  # (rows,) bool"""
        ...


@dataclass(frozen=True)
class TableGrid:
    """Any values: a table a row.  # table: (rows, 2^bits), ascending, exact in bfloat16"""

    table: Tensor

    @cached_property
    def middles(self) -> Tensor:
        """Between which a value is the nearest.  # (rows, 2^bits - 1)"""
        return (self.table[:, 1:] + self.table[:, :-1]) / 2

    def nearest(self, column: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As `Grid` says; ties go to the lower value."""
        codes = torch.searchsorted(self.middles, weight[:, None])
        return codes[:, 0].to(torch.uint8), self.table.gather(1, codes)[:, 0]

    def dense(self, codes: Tensor) -> Tensor:
        """As `Grid` says; slice by slice, for indices are eight times as large as codes."""
        dense = self.table.new_empty(codes.shape)
        for rows in _slices(codes, 4):
            torch.gather(self.table[rows], 1, codes[rows].long(), out=dense[rows])
        return dense

    def refitted(self, codes: Tensor, pull: Tensor, hessian: Tensor, enough: Tensor) -> "TableGrid":
        """As `Grid` says. A value without weights stays, and so does a table that would no longer ascend: codes would not be nearest."""
        table = torch.cat([self._moved(rows, codes[rows].long(), pull[rows], hessian, enough[rows]) for rows in _slices(codes, 4)])
        ascends = (table.diff(dim=1) >= 0).all(dim=1, keepdim=True)
        return TableGrid(stored(torch.where(ascends, table, self.table)))

    def _moved(self, rows: slice, codes: Tensor, *fit: Tensor) -> Tensor:
        def decode(change: Tensor) -> Tensor:
            return change.float().gather(1, codes)

        def sums(dense: Tensor) -> Tensor:
            return dense.new_zeros(len(dense), self.table.shape[1], dtype=torch.float64).scatter_add_(1, codes, dense.double())

        return self.table[rows] + best_change(decode, sums, *fit)

    def where(self, rows: Tensor, other: "TableGrid") -> "TableGrid":
        """As `Grid` says."""
        return TableGrid(torch.where(rows[:, None], self.table, other.table))


@dataclass(frozen=True)
class AffineGrid:
    """Evenly spaced values `scale · (code - zero)`, for every group of columns of a row.  # scale, zero: (rows, groups); zero is whole"""

    scale: Tensor
    zero: Tensor
    bits: int
    columns: int

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.columns // self.scale.shape[1]

    def nearest(self, column: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As `Grid` says; halves go to the even code."""
        scale, zero = self.scale[:, column // self.group], self.zero[:, column // self.group]
        codes = (weight / scale + zero).round_().clamp_(0, 2**self.bits - 1)
        return codes.to(torch.uint8), scale * (codes - zero)

    def dense(self, codes: Tensor) -> Tensor:
        """As `Grid` says."""
        return (self._steps(codes) * self.scale[:, :, None]).flatten(1)

    def _steps(self, codes: Tensor) -> Tensor:
        return codes.to(self.scale.dtype).unflatten(1, (-1, self.group)) - self.zero[:, :, None]

    def refitted(self, codes: Tensor, pull: Tensor, hessian: Tensor, enough: Tensor) -> "AffineGrid":
        """As `Grid` says: the scales of a row together, for zeros as they are."""
        steps = self._steps(codes)  # (rows, groups, columns of a group)
        scale = torch.cat([self._moved(rows, steps[rows], pull[rows], hessian, enough[rows]) for rows in _slices(codes, 4)])
        return replace(self, scale=stored(torch.where(scale > 0, scale, self.scale)))

    def _moved(self, rows: slice, steps: Tensor, *fit: Tensor) -> Tensor:
        def decode(change: Tensor) -> Tensor:
            return (change.float()[:, :, None] * steps).flatten(1)

        def sums(dense: Tensor) -> Tensor:
            return (dense.view_as(steps) * steps).sum(dim=2, dtype=torch.float64)

        return self.scale[rows] + best_change(decode, sums, *fit)

    def where(self, rows: Tensor, other: "AffineGrid") -> "AffineGrid":
        """As `Grid` says."""
        scale, zero = (torch.where(rows[:, None], mine, its) for mine, its in ((self.scale, other.scale), (self.zero, other.zero)))
        return replace(self, scale=scale, zero=zero)


def stored(values: Tensor) -> Tensor:
    """As they come back from 16 bits."""
    return values.to(torch.bfloat16).to(torch.float32)


def _slices(codes: Tensor, many: int) -> list[slice]:
    """Rows with at most `many` times `FITTED` codes together."""
    step = max(1, many * FITTED // codes.shape[1])
    return [slice(start, start + step) for start in range(0, len(codes), step)]


@dataclass(frozen=True)
class Ranked:
    """Rows of weights in ascending order, with running sums of a, a·w and a·w² before each, a being a weight's importance.

    # values (rows, n) float32; sums: three of (rows, n + 1) float64
    """

    values: Tensor
    sums: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, rows: Tensor, importance: Tensor | None = None) -> "Ranked":
        """# rows: (rows, n); importance: (n,) or (rows, n), all 1 if None"""
        values, order = rows.float().sort(dim=1)
        if importance is None:
            importance = torch.ones_like(values)
        weights, wide = importance.expand(values.shape).gather(1, order).double(), values.double()
        moments = (weights, weights * wide, weights * wide * wide)
        return cls(values, tuple(torch.nn.functional.pad(moment.cumsum(dim=1), (1, 0)) for moment in moments))  # type: ignore[arg-type]

    def before(self, middles: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of a and of a·w over what lies before ascending `middles`.  # (rows, k) → two of (rows, k)"""
        ends = torch.searchsorted(self.values, middles)
        return self.sums[0].gather(1, ends), self.sums[1].gather(1, ends)

    def error(self, grid: Tensor) -> Tensor:
        """`Σ a (w - nearest)²` on an ascending grid, reckoned downwards: as if all weights took the greatest value, then what those before
        a middle m save by the value below it, which lies a step s lower: `2 s Σ a (m - w)`.  # (rows, k) → (rows,) float64
        """
        a, aw = self.before((grid[:, 1:] + grid[:, :-1]) / 2)
        wide, (all_a, all_aw, all_aww) = grid.double(), (total[:, -1] for total in self.sums)
        greatest, middles = wide[:, -1], (wide[:, 1:] + wide[:, :-1]) / 2
        saved = 2 * (wide.diff(dim=1) * (middles * a - aw)).sum(dim=1)
        return all_aww - 2 * greatest * all_aw + greatest * greatest * all_a - saved


def fit_table(rows: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """The table of each row by weighted k-means (LeanQuant, section 4), begun where dynamic programming over a few bins ends.

    The paper starts evenly at 2 and 3 bits and by k-means++ at 4, and ends in local optima: at 4 bits half above the least error.
    # rows (rows, n), importance (n,) → (rows, 2^bits) float32, exact in bfloat16
    """
    step = max(1, min(FITTED // rows.shape[1], 2 * FITTED // BINS**2))
    return torch.cat([_fit_table(part, 2**bits, importance) for part in rows.split(step)])


def _fit_table(rows: Tensor, levels: int, importance: Tensor | None) -> Tensor:
    ranked = Ranked.of(rows, importance)
    start = _even_start if levels > BINS or rows.shape[1] <= levels else _binned_start
    return stored(k_means(ranked, start(ranked, levels)))


BINS = 96
"""Into which a row is cut for its start. At 384 weights and 4 bits 64, 96 and 128 end 8, 4 and 3 % above the optimum, plain starts 54 %."""


def _even_start(ranked: Ranked, levels: int) -> Tensor:
    """Evenly spaced from the least weight to the greatest."""
    low, high = ranked.values[:, :1], ranked.values[:, -1:]
    return low + (high - low) * torch.linspace(0, 1, levels, device=low.device)


def _binned_start(ranked: Ranked, levels: int) -> Tensor:
    """The best cut of equally full bins into `levels` runs, each with its weighted mean."""
    count = ranked.values.shape[1]
    bins = min(BINS, count)
    edges = torch.arange(bins + 1, device=ranked.values.device) * count // bins
    a, aw, aww = (total[:, edges] for total in ranked.sums)
    cost = _runs(aww).sub_(_runs(aw).square_().div_(_runs(a).clamp_(min=1e-300)))
    cost = cost.float().masked_fill(~torch.ones(bins + 1, bins + 1, dtype=torch.bool, device=edges.device).triu(1), float("inf"))
    least = [cost[:, 0]]  # least[runs - 1][r, j]: of the bins before j in so many runs
    for _ in range(levels - 1):
        least.append((least[-1][:, :, None] + cost).amin(dim=1))
    every = torch.arange(len(cost), device=edges.device)
    cuts = [torch.full_like(every, bins)]
    for ways in reversed(least[:-1]):  # the cut before is looked for where it is needed: a minimum without its place takes a fifth
        cuts.append((ways + cost[every, :, cuts[-1]]).argmin(dim=1))
    ends = torch.stack([torch.zeros_like(every), *reversed(cuts)], dim=1)
    return (aw.gather(1, ends).diff(dim=1) / a.gather(1, ends).diff(dim=1).clamp(min=1e-300)).float()


def _runs(sums: Tensor) -> Tensor:
    """What lies in bins i … j - 1, from running sums.  # (rows, bins + 1) → (rows, bins + 1, bins + 1)"""
    return sums[:, None, :] - sums[:, :, None]


def k_means(ranked: Ranked, start: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Lloyd's rounds in one dimension. A value without weights stays.  # (rows, k) ascending → the same"""
    grid = start
    for _ in range(rounds):
        ends = [total[:, -1:] for total in ranked.sums[:2]]
        before = ranked.before((grid[:, 1:] + grid[:, :-1]) / 2)
        a, aw = (torch.cat([0 * end, sums, end], dim=1).diff(dim=1) for sums, end in zip(before, ends, strict=True))
        moved = torch.where(a > 0, aw / a.clamp(min=1e-300), grid.double()).float().sort(dim=1).values
        if torch.equal(moved, grid):
            break
        grid = moved
    return grid
