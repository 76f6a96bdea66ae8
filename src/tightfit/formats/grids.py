"""Grids: the few values that the weights of a row may take, how they are fitted to the weights, and how codes on them are found.

Rows are independent of each other everywhere. A row's squared error on any sorted grid needs no look at its weights: they are sorted
once, sums of their moments are kept, and a grid value's share lies between two midpoints. So a round of k-means, or a candidate of a
search over ranges, costs the logarithm of the row's length.
"""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

ROUNDS = 100
"""Of k-means at most; it ends when nothing moves any more."""

_SLICE = 1 << 18
"""Weights that are fitted at a time: three running sums in float64 for each."""


class Grid(Protocol):
    """The values that each weight of a matrix may take. All tensors are float32 on one device."""

    def nearest(self, column: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and values nearest to the weights of one column.  # (rows,) → (rows,) uint8, (rows,)"""
        ...

    def dense(self, codes: Tensor) -> Tensor:
        """The values of all codes.  # (rows, columns) uint8 → (rows, columns)"""
        ...

    def refitted(self, codes: Tensor, weight: Tensor, hessian: Tensor) -> Self:
        """The grid with the least error `(weight - dense) H (weight - dense)ᵀ` in every row for these codes, rounded as it is stored."""
        ...

    def where(self, rows: Tensor, other: Self) -> Self:
        """This grid in the `rows` that are true, the other elsewhere.  # (rows,) bool"""
        ...


@dataclass(frozen=True)
class TableGrid:
    """Any values: a table a row.  # table: (rows, 2^bits), ascending, exact in bfloat16"""

    table: Tensor

    def nearest(self, column: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As `Grid` says; ties go to the lower value."""
        middles = (self.table[:, 1:] + self.table[:, :-1]) / 2
        codes = (weight[:, None] > middles).sum(dim=1)
        return codes.to(torch.uint8), self.table.gather(1, codes[:, None]).squeeze(1)

    def dense(self, codes: Tensor) -> Tensor:
        """As `Grid` says."""
        return self.table.gather(1, codes.long())

    def refitted(self, codes: Tensor, weight: Tensor, hessian: Tensor) -> "TableGrid":
        """The table `t` solves `(CᵀHC) t = CᵀH w`, where C says which code each column has. A value that no weight has stays."""
        levels, table = self.table.shape[1], self.table.clone()
        step = max(1, _SLICE * 4 // (hessian.shape[0] * levels))
        for rows in torch.arange(len(codes)).split(step):
            chosen = torch.nn.functional.one_hot(codes[rows].long(), levels).to(hessian.dtype)  # (rows, columns, levels)
            spread = torch.einsum("ij,rjl->ril", hessian, chosen)
            products = chosen.transpose(1, 2) @ spread
            aims = torch.einsum("ril,ri->rl", spread, weight[rows])
            table[rows] = _solved(products, aims, self.table[rows])
        ascends = (table.diff(dim=1) >= 0).all(dim=1, keepdim=True)  # else codes would no longer be nearest
        return TableGrid(stored(torch.where(ascends, table, self.table)))

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

    def refitted(self, codes: Tensor, weight: Tensor, hessian: Tensor) -> "AffineGrid":
        """The scales of a row together, for zeros as they are: one normal equation a group."""
        steps, groups, scale = self._steps(codes), self.scale.shape[1], self.scale.clone()  # steps: (rows, groups, columns of a group)
        parts = hessian.unflatten(0, (groups, self.group))  # (groups, columns of a group, columns)
        for rows in torch.arange(len(codes)).split(max(1, _SLICE * 8 // (groups * self.columns))):
            spread = torch.einsum("rgi,gij->rgj", steps[rows], parts)
            products = torch.einsum("rghj,rhj->rgh", spread.unflatten(2, (groups, self.group)), steps[rows])
            aims = torch.einsum("rgj,rj->rg", spread, weight[rows])
            scale[rows] = _solved(products, aims, self.scale[rows])
        return replace(self, scale=stored(torch.where(scale > 0, scale, self.scale)))

    def where(self, rows: Tensor, other: "AffineGrid") -> "AffineGrid":
        """As `Grid` says."""
        scale, zero = (torch.where(rows[:, None], mine, its) for mine, its in ((self.scale, other.scale), (self.zero, other.zero)))
        return replace(self, scale=scale, zero=zero)


def stored(values: Tensor) -> Tensor:
    """As they come back from 16 bits."""
    return values.to(torch.bfloat16).to(torch.float32)


def _solved(products: Tensor, aims: Tensor, old: Tensor) -> Tensor:
    """The change of `old` that least squares ask for; what has no say (a zero on the diagonal) keeps its value."""
    diagonal = products.diagonal(dim1=1, dim2=2)
    tiny = 1e-6 * diagonal.mean(dim=1, keepdim=True).clamp(min=1e-30)
    safe = products + torch.diag_embed(tiny + (diagonal <= 0))
    rest = aims - torch.einsum("rij,rj->ri", products, old)
    found = old + torch.linalg.solve(safe, rest)
    return torch.where((diagonal > 0) & found.isfinite(), found, old)


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

    def between(self, middles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three sums of what lies before, between and after ascending `middles`.  # (rows, k - 1) → three of (rows, k)"""
        ends = torch.searchsorted(self.values, middles)
        first, last = ends.new_zeros(len(ends), 1), ends.new_full((len(ends), 1), self.values.shape[1])
        edges = torch.cat([first, ends, last], dim=1)
        a, aw, aww = (total.gather(1, edges).diff(dim=1) for total in self.sums)
        return a, aw, aww

    def error(self, grid: Tensor) -> Tensor:
        """`Σ a (w - nearest)²` on an ascending grid.  # (rows, k) → (rows,) float64"""
        a, aw, aww = self.between((grid[:, 1:] + grid[:, :-1]) / 2)
        wide = grid.double()
        return (aww - 2 * wide * aw + wide * wide * a).sum(dim=1)


def fit_table(rows: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """The table of each row by weighted k-means (LeanQuant, section 4), begun where dynamic programming over a few bins ends.

    The paper starts evenly at 2 and 3 bits and by k-means++ at 4, and ends in local optima: at 4 bits half above the least error.
    # rows (rows, n), importance (n,) → (rows, 2^bits) float32, exact in bfloat16
    """
    step = max(1, min(_SLICE // rows.shape[1], 2 * _SLICE // BINS**2))
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
    cost = _runs(aww) - _runs(aw).square() / _runs(a).clamp(min=1e-300)
    cost = cost.float().masked_fill(~torch.ones(bins + 1, bins + 1, dtype=torch.bool, device=edges.device).triu(1), float("inf"))
    least, froms = cost[:, 0], []  # least[r, j]: of the bins before j in so many runs
    for _ in range(levels - 1):
        least, best = (least[:, :, None] + cost).min(dim=1)
        froms.append(best)
    cuts = [torch.full_like(froms[0][:, :1], bins)]
    for best in reversed(froms):
        cuts.append(best.gather(1, cuts[-1]))
    ends = torch.cat([torch.zeros_like(cuts[0]), *reversed(cuts)], dim=1)
    return (aw.gather(1, ends).diff(dim=1) / a.gather(1, ends).diff(dim=1).clamp(min=1e-300)).float()


def _runs(sums: Tensor) -> Tensor:
    """What lies in bins i … j - 1, from running sums.  # (rows, bins + 1) → (rows, bins + 1, bins + 1)"""
    return sums[:, None, :] - sums[:, :, None]


def k_means(ranked: Ranked, start: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Lloyd's rounds in one dimension. A value without weights stays.  # (rows, k) ascending → the same"""
    grid = start
    for _ in range(rounds):
        a, aw, _ = ranked.between((grid[:, 1:] + grid[:, :-1]) / 2)
        moved = torch.where(a > 0, aw / a.clamp(min=1e-300), grid.double()).float().sort(dim=1).values
        if torch.equal(moved, grid):
            break
        grid = moved
    return grid


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

_COARSE = 64
"""Steps between the first candidates: 16 each way."""


def search_range(rows: Tensor, bits: int, importance: Tensor | None = None, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Scale and zero of least weighted error over ranges that leave out up to half at either end (LeanQuant, affine grids).

    The paper tries all `(steps / 2)²` pairs. Here a coarse net comes first and then the eight neighbours at half the distance, until the
    paper's step is reached: some 300 candidates, each of which costs 2^bits look-ups in sorted weights.
    # rows (rows, n), importance (n,) or (rows, n) → (rows,), (rows,)
    """
    step, found = max(1, _SLICE // rows.shape[1]), []
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
