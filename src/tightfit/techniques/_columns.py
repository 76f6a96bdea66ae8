"""Columns: choose a layer's codes one column after the other, each error made good by the columns that are still free.

What GPTQ and LeanQuant share: the Hessian of a layer's squared output error, its factor, the walk over the columns, and descents after
it. Errors are `tr (W - Q) H (W - Q)ᵀ`; all is in float32.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tightfit.formats.grids import Grid
from tightfit.terms.errors import TightfitError
from tightfit.terms.units import MIB

BLOCK = 32
"""Columns at most that act on each other one by one; more of them act on others in one product (GPTQ, section 3)."""

SLICES = 48 * MIB
"""What `formats/grids.py` holds of the rows that it fits at a time, at most."""

WORTH = 5e-4
"""Share of the error below which a step of a refit is the last: the turns after it find the rest (0.1 % at most is lost in the end)."""

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
        missed = missed @ found.upper.t()
        missed = (missed @ found.upper).mul_(share)
        return Layer(self.weight.index_add(1, found.order, missed), self.hessian)

    def error(self, dense: Tensor) -> Tensor:
        """Squared output error of each row.  # (rows, columns) → (rows,)"""
        return (self.pull(dense) * (self.weight - dense).t()).sum(dim=0)

    def pull(self, dense: Tensor) -> Tensor:
        """`H (W - Q)ᵀ`: half of how fast each row's error falls as a column of Q grows.  # (rows, columns) → (columns, rows)"""
        return self.hessian @ (self.weight - dense).t()


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
    return _walk(layer, found, grid)[0]


def _walk(layer: Layer, found: Factor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The codes, and the damped error of each row: steps S make `W - Q = SU`, and with `H⁻¹ = UᵀU` what is left of it is S Sᵀ."""
    columns, own = found.order.tolist(), found.upper.diagonal().tolist()
    weight = layer.weight.t().index_select(0, found.order)  # (columns, rows), as they are walked
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)

    def step(at: int) -> Tensor:
        code, value = grid.nearest(columns[at], weight[at])
        codes[columns[at]] = code
        return (weight[at] - value) / own[at]

    _sweep(step, weight, weight, found.upper, range(len(columns)), back=False)  # a column walked is needed no more: there its step lies
    return codes.t().contiguous(), torch.linalg.vector_norm(weight, dim=0).square()


def descend(layer: Layer, codes: Tensor, grid: Grid, pull: Tensor) -> tuple[Tensor, Tensor]:
    """One round of coordinate descent: each column takes the codes that are best while all others stay. The error never grows.

    # codes (rows, columns) uint8, pull (columns, rows): the layer's at these codes → both as they are then
    """
    pull, own = pull.clone(), layer.hessian.diagonal().tolist()
    moves = grid.dense(codes).t().contiguous()  # the old value of each column, until its move takes the place
    codes = torch.empty(moves.shape, dtype=torch.uint8, device=moves.device)

    def step(at: int) -> Tensor:
        codes[at], value = grid.nearest(at, moves[at] + pull[at] / own[at])
        return value - moves[at]

    _sweep(step, moves, pull, layer.hessian, range(len(own)), back=True)
    return codes.t().contiguous(), pull


def _sweep(step: Callable[[int], Tensor], steps: Tensor, state: Tensor, matrix: Tensor, columns: range, back: bool) -> None:
    """Fill `steps` column by column, and take `matrixᵀ steps` from `state`: from later columns before their turn, and if `back` from all.

    Halves of halves: what one half does to the other is one product, and only the last few columns go one by one. A column is a row
    here, so that all it is has one place in memory.  # steps, state (columns, rows), matrix (columns, columns)
    """
    if len(columns) > BLOCK:
        halves = columns[: len(columns) // 2], columns[len(columns) // 2 :]
        former, latter = (slice(half.start, half.stop) for half in halves)
        _sweep(step, steps, state, matrix, halves[0], back)
        state[latter].addmm_(matrix[former, latter].t(), steps[former], alpha=-1)
        _sweep(step, steps, state, matrix, halves[1], back)
        if back:
            state[former].addmm_(matrix[latter, former].t(), steps[latter], alpha=-1)
    else:
        for at in columns:
            steps[at] = step(at)
            reached = slice(columns.start if back else at + 1, columns.stop)
            state[reached].addr_(matrix[at, reached], steps[at], alpha=-1)


def solve_bytes(rows: int, columns: int, fits: bool) -> int:
    """Most bytes that a solver holds beside a layer: matrices of columns² while the Hessian is factored, or of rows · columns later.

    `fits`: grids are fitted, slice by slice, and not just taken from the least weight and the greatest.
    """
    square, matrix = 4 * columns * columns, 4 * rows * columns
    return max(7 * square + 2 * matrix, 4 * square + 6 * matrix + matrix // 2) + (SLICES if fits else 0)


def walked(layer: Layer, found: Factor, grids: Iterable[Grid]) -> tuple[Tensor, Grid]:
    """Codes on each of `grids`; every row keeps the grid on which its damped error came out least.  # → codes (rows, columns), the grid"""
    kept = None
    for grid in grids:
        codes, error = _walk(layer, found, grid)
        if kept is None:
            kept = codes, grid, error
        else:
            better = error < kept[2]
            kept = torch.where(better[:, None], codes, kept[0]), grid.where(better, kept[1]), torch.where(better, error, kept[2])
    assert kept is not None, "one grid at least"
    return kept[0], kept[1]


def polished(layer: Layer, codes: Tensor, grid: Grid, rounds: int) -> tuple[Tensor, Grid]:
    """Take turns: the best grid for the codes, then better codes on that grid. Each row keeps what it had where a turn does not help."""
    pull = layer.pull(grid.dense(codes))
    enough = WORTH * (layer.weight - grid.dense(codes)).t().mul_(pull).sum(dim=0)  # of the error, without its product once more
    for _ in range(rounds):
        grid, pull = _refitted(layer, codes, grid, pull, enough)
        codes, pull = descend(layer, codes, grid, pull)
    return codes, grid


def _refitted(layer: Layer, codes: Tensor, grid: Grid, pull: Tensor, enough: Tensor) -> tuple[Grid, Tensor]:
    """The best grid for the codes in the rows where it helps, as 16 bits round what least squares found, and the pull that is left.

    Moves D take `D · (pull + what is left)` from a row's error.
    """
    fitted = grid.refitted(codes, pull.t(), layer.hessian, enough)
    moves = fitted.dense(codes).sub_(grid.dense(codes)).t()
    left = torch.addmm(pull, layer.hessian, moves, alpha=-1)
    better = (pull + left).mul_(moves).sum(dim=0) > 0
    return fitted.where(better, grid), torch.where(better, left, pull)
