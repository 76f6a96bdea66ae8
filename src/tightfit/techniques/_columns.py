"""Columns: choose a layer's codes one column after the other, each error made good by the columns that are still free.

What GPTQ and LeanQuant share: the Hessian of a layer's squared output error, its factor, the walk over the columns, and descents after
it. Errors are `tr (W - Q) H (W - Q)ᵀ`; all is in float32.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tightfit.formats.grids import Grid
from tightfit.terms.errors import TightfitError
from tightfit.terms.units import MIB

BLOCK = 128
"""Columns whose errors reach the columns after them in one product (GPTQ, section 3)."""

SLICES = 48 * MIB
"""What `formats/grids.py` holds of the rows that it fits at a time, at most."""

RAISES = 4
"""How often a damping that does not suffice is raised tenfold."""


@dataclass(frozen=True)
class Layer:
    """A layer's weight, and the mean of `2 x xᵀ` over its inputs.  # weight (rows, columns), hessian (columns, columns); float32"""

    weight: Tensor
    hessian: Tensor

    def damped(self, share: float) -> "Layer":
        """With a share of the mean diagonal added: inputs that the calibration text did not show."""
        hessian = self.hessian.clone()
        hessian.diagonal().add_(share * hessian.diagonal().mean())
        return Layer(self.weight, hessian)

    def aimed(self, cross: Tensor, found: "Factor", share: float) -> "Layer":
        """The weight that gives from the inputs x what the layer gave from the dense model's y, `share` of the way; H damped.

        `Σ (W y - Q x)²` is least at `Q = W C H⁻¹`, C being the mean of 2 y xᵀ.  # cross (columns, columns)
        """
        missed = (self.weight @ (cross - self.hessian))[:, found.order]
        weight = self.weight.clone()
        weight[:, found.order] += share * (missed @ found.upper.t() @ found.upper)
        return Layer(weight, self.hessian)

    def error(self, dense: Tensor) -> Tensor:
        """Squared output error of each row.  # (rows, columns) → (rows,)"""
        off = self.weight - dense
        return ((off @ self.hessian) * off).sum(dim=1)


@dataclass(frozen=True)
class Factor:
    """The upper Cholesky factor U of the inverse Hessian, `H⁻¹ = UᵀU`, of columns in the `order` in which they are walked."""

    order: Tensor  # (columns,)
    upper: Tensor  # (columns, columns)
    damping: float  # the share of the mean diagonal that made it possible

    def importance(self, power: float) -> Tensor:
        """`U_jj^(-power)` in the columns' own order: U_jj² is the inverse Hessian's diagonal given all columns walked before."""
        logs = self.upper.diagonal().double().log()
        found = torch.empty_like(logs)
        found[self.order] = (-power * (logs - logs.mean())).exp()  # a common factor changes nothing
        return found.float()

    def plain_importance(self, power: float) -> Tensor:
        """`[H⁻¹]_jj^(-power)`, the weighting as LeanQuant's text has it, in the columns' own order."""
        logs = self.upper.double().square().sum(dim=0).log()
        found = torch.empty_like(logs)
        found[self.order] = (-power * (logs - logs.mean())).exp()
        return found.float()


def settle(weight: Tensor, hessian: Tensor) -> Layer:
    """The layer in float32; columns that were never fed count for nothing and become nought (GPTQ's dead columns).

    Raises `TightfitError` for NaN or infinite values on either side.
    """
    if not weight.isfinite().all():
        raise TightfitError("the weight holds NaN or infinite values", hint="the checkpoint may be damaged; fetch it again")
    if not hessian.isfinite().all():
        raise TightfitError("its inputs are not finite", hint="the model overflows in this precision: load it in bfloat16 or float32")
    dead = hessian.diagonal() <= 0
    hessian = hessian.clone()
    hessian.diagonal()[dead] = hessian.diagonal()[~dead].mean() if not dead.all() else 1.0  # of no weight in any mean
    return Layer(weight.float().masked_fill(dead, 0.0), hessian)


def factor(layer: Layer, damping: float, ordered: bool) -> Factor:
    """Factor the inverse Hessian, columns by falling diagonal if `ordered`; a damping that does not suffice is raised tenfold.

    Raises `TightfitError` when the Hessian stays singular.
    """
    diagonal = layer.hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if ordered else torch.arange(len(diagonal), device=diagonal.device)
    for raised in range(RAISES):
        share = damping * 10**raised
        damped = layer.hessian[order][:, order]
        damped.diagonal().add_(share * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and upper.isfinite().all():
                return Factor(order, upper, share)
    raise TightfitError(
        f"its Hessian is singular, even with a damping of {share:g}", hint="give more calibration text, or a larger `damping` such as 0.1"
    )


def walk(layer: Layer, found: Factor, grid: Grid) -> Tensor:
    """Codes on `grid`, column by column; what a column is off goes to the later ones (OBQ's update in GPTQ's order).

    # → (rows, columns) uint8, in the columns' own order
    """
    order, upper = found.order, found.upper
    weight = layer.weight[:, order]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    columns = order.tolist()
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        part, within = weight[:, start:stop].clone(), upper[start:stop, start:stop]
        errors = torch.empty_like(part)
        for at in range(stop - start):
            code, value = grid.nearest(columns[start + at], part[:, at])
            codes[:, columns[start + at]] = code
            errors[:, at] = (part[:, at] - value) / within[at, at]
            part[:, at + 1 :] -= torch.outer(errors[:, at], within[at, at + 1 :])
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes


def descend(layer: Layer, codes: Tensor, grid: Grid) -> Tensor:
    """One round of coordinate descent: each column takes the codes that are best while all others stay. The error never grows.

    # codes (rows, columns) uint8 → the same
    """
    codes, dense = codes.clone(), grid.dense(codes)
    pull = (layer.weight - dense) @ layer.hessian  # (rows, columns)
    for start in range(0, dense.shape[1], BLOCK):
        stop = min(start + BLOCK, dense.shape[1])
        own, within = pull[:, start:stop].clone(), layer.hessian[start:stop, start:stop]
        moves = torch.zeros_like(own)
        for at in range(stop - start):
            old = dense[:, start + at]
            code, value = grid.nearest(start + at, old + own[:, at] / within[at, at])
            codes[:, start + at] = code
            moves[:, at] = value - old
            own[:, at:] -= torch.outer(moves[:, at], within[at, at:])
        dense[:, start:stop] += moves
        pull -= moves @ layer.hessian[start:stop]
    return codes


def solve_bytes(rows: int, columns: int, fits: bool) -> int:
    """Most bytes that a solver holds beside a layer: matrices of columns² while the Hessian is factored, or of rows · columns later.

    `fits`: grids are fitted, slice by slice, and not just taken from the least weight and the greatest.
    """
    square, matrix = 4 * columns * columns, 4 * rows * columns
    return max(7 * square + 2 * matrix, 4 * square + 6 * matrix + matrix // 2) + (SLICES if fits else 0)


def walked(layer: Layer, found: Factor, grids: Iterable[Grid]) -> tuple[Tensor, Grid]:
    """Codes on each of `grids`; every row keeps the grid on which its damped error came out least.  # → codes (rows, columns), the grid"""
    damped, kept = layer.damped(found.damping), None
    for grid in grids:
        codes = walk(layer, found, grid)
        error = damped.error(grid.dense(codes))
        if kept is None:
            kept = codes, grid, error
        else:
            better = error < kept[2]
            kept = torch.where(better[:, None], codes, kept[0]), grid.where(better, kept[1]), torch.where(better, error, kept[2])
    assert kept is not None, "one grid at least"
    return kept[0], kept[1]


def polished(layer: Layer, codes: Tensor, grid: Grid, rounds: int) -> tuple[Tensor, Grid]:
    """Take turns: the best grid for the codes, then better codes on that grid. Each row keeps what it had where a turn does not help."""
    for _ in range(rounds):
        before = layer.error(grid.dense(codes))
        fitted = grid.refitted(codes, layer.weight, layer.hessian)
        grid = _better(layer, codes, grid, fitted, before)
        codes = descend(layer, codes, grid)
    return codes, grid


def _better(layer: Layer, codes: Tensor, old: Grid, new: Grid, before: Tensor) -> Grid:
    """The new grid in the rows where it is better: 16 bits round what least squares found."""
    return new.where(layer.error(new.dense(codes)) < before, old)
