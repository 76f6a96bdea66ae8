"""Grids: fits against optima found by plain loops, and refits against least squares solved in another way."""

import itertools

import pytest
import torch

from tightfit.formats.grids import AffineGrid, Ranked, TableGrid, fit_table, k_means, stored
from tightfit.formats.ranges import min_max, range_grid, search_range


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_error(row, grid, importance):
    return sum(a * min((w - g) ** 2 for g in grid) for w, a in zip(row.tolist(), importance.tolist(), strict=True))


def best_error(row, levels, importance):
    """The optimum of weighted one-dimensional k-means, by dynamic programming over the sorted weights."""
    order = row.argsort()
    w, a = row[order].double().tolist(), importance[order].double().tolist()
    n, infinite = len(w), float("inf")

    def cost(i, j):
        weight = sum(a[i:j])
        mean = sum(x * y for x, y in zip(w[i:j], a[i:j], strict=True)) / weight
        return sum(y * (x - mean) ** 2 for x, y in zip(w[i:j], a[i:j], strict=True))

    costs = {(i, j): cost(i, j) for i in range(n) for j in range(i + 1, n + 1)}
    best = [0.0] + [infinite] * n
    for _ in range(levels):
        best = [0.0] + [min(best[i] + costs[i, j] for i in range(j)) for j in range(1, n + 1)]
    return best[n]


def test_the_error_of_a_grid_is_the_plain_sum():
    rows, importance = drawn(5, 33), drawn(33, seed=1).abs() + 0.1
    grid = drawn(5, 6, seed=2).sort(dim=1).values
    found = Ranked.of(rows, importance).error(grid)
    for row, values, error in zip(rows, grid.tolist(), found.tolist(), strict=True):
        assert error == pytest.approx(plain_error(row, values, importance), rel=1e-5)


def test_importance_may_differ_from_row_to_row():
    rows, importance, grid = drawn(4, 20), drawn(4, 20, seed=1).abs(), drawn(4, 4, seed=2).sort(dim=1).values
    together = Ranked.of(rows, importance).error(grid)
    alone = [Ranked.of(rows[at : at + 1], importance[at]).error(grid[at : at + 1]) for at in range(4)]
    assert torch.allclose(together, torch.cat(alone))


def test_k_means_ends_where_every_value_is_the_mean_of_its_weights():
    rows, importance = drawn(3, 64), drawn(64, seed=1).abs() + 0.1
    ends = k_means(Ranked.of(rows, importance), torch.linspace(-2, 2, 8).expand(3, 8))
    for row, grid in zip(rows, ends, strict=True):
        nearest = (row[:, None] - grid).abs().argmin(dim=1)
        for code in nearest.unique().tolist():
            mine = nearest == code
            assert grid[code].item() == pytest.approx(((row * importance)[mine].sum() / importance[mine].sum()).item(), abs=1e-5)


@pytest.mark.parametrize("bits", [2, 3])
def test_tables_are_near_the_optimum(bits):
    rows, importance = drawn(6, 40), drawn(40, seed=1).abs() + 0.05
    tables = fit_table(rows, bits, importance)
    assert torch.equal(tables, stored(tables)) and bool((tables.diff(dim=1) >= 0).all())
    ratios = []
    for row, table in zip(rows, tables, strict=True):
        ratios.append(plain_error(row, table.tolist(), importance) / best_error(row, 2**bits, importance))
    assert min(ratios) > 0.99  # 16 bits round the table: none beats the optimum by more than that
    assert max(ratios) < 1.001


def test_the_search_finds_what_trying_every_range_finds():
    rows, steps, bits = drawn(8, 48), 64, 3
    scale, zero = search_range(rows, bits, steps=steps)
    found = AffineGrid(scale[:, None], zero[:, None], bits, 48)
    whole = AffineGrid(*(part[:, None] for part in min_max(rows, bits)), bits, 48)
    low, high = rows.amin(dim=1).clamp(max=0), rows.amax(dim=1).clamp(min=0)
    least = torch.full((8,), float("inf"))
    for u, v in itertools.product(range(steps // 2), repeat=2):
        width = stored((high - low) * (1 - (u + v) / steps) / 7)
        offset = (-(low + u * (high - low) / steps) / width).round().clamp(0, 7)
        least = torch.minimum(least, rounding(rows, AffineGrid(width[:, None], offset[:, None], bits, 48)))
    assert bool((rounding(rows, found) <= 1.1 * least + 1e-6).all())
    assert rounding(rows, found).sum() < 1.03 * least.sum() < rounding(rows, whole).sum()


def rounding(rows, grid):
    return torch.stack([(rows[:, at] - grid.nearest(at, rows[:, at].contiguous())[1]) ** 2 for at in range(rows.shape[1])]).sum(dim=0)


@pytest.mark.parametrize("grid", ["table", "affine", "grouped"])
def test_a_refit_is_what_least_squares_give(grid):
    weight, root = drawn(3, 64), drawn(64, 64, seed=1)
    hessian = root @ root.t() / 64 + 0.1 * torch.eye(64)
    found = TableGrid(fit_table(weight, 2)) if grid == "table" else range_grid(weight, 3, 2 if grid == "grouped" else 1, searched=False)
    codes = torch.stack([found.nearest(at, weight[:, at].contiguous())[0] for at in range(64)], dim=1)
    pull = (weight - found.dense(codes)) @ hessian
    lower = torch.linalg.cholesky(hessian.double()).t()  # |lower (w - q)|² is the error
    for row, refitted in enumerate(_values(found.refitted(codes, pull, hessian, torch.zeros(3)))):
        design = _design(found, codes, row)
        expected = torch.linalg.lstsq(lower @ design, (lower @ weight[row].double())[:, None]).solution[:, 0]
        assert torch.allclose(refitted.double(), expected, rtol=0.01, atol=2e-3)  # 8 bits of mantissa


def _values(grid):
    return grid.table if isinstance(grid, TableGrid) else grid.scale


def _design(grid, codes, row):
    """dense = design @ values, for one row."""
    if isinstance(grid, TableGrid):
        return torch.nn.functional.one_hot(codes[row].long(), 4).double()
    steps = codes[row].double().view(grid.scale.shape[1], -1) - grid.zero[row].double()[:, None]
    return torch.block_diag(*[part[:, None] for part in steps])


def test_values_without_weights_stay_in_a_refit():
    grid = TableGrid(torch.tensor([[-1.0, 0.0, 1.0, 5.0]]))
    codes, weight = torch.tensor([[0, 1, 2, 2]], dtype=torch.uint8), torch.tensor([[-1.5, 0.25, 1.0, 2.0]])
    refitted = grid.refitted(codes, weight - grid.dense(codes), torch.eye(4), torch.zeros(1))
    assert refitted.table.tolist() == [[-1.5, 0.25, 1.5, 5.0]]


def test_min_max_reaches_both_ends_and_holds_nought():
    rows = torch.tensor([[0.5, 1.0, 2.0], [-3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    scale, zero = min_max(rows, 2)
    assert zero.tolist() == [0, 3, 0] and scale.tolist() == pytest.approx([2 / 3, 1.0, 1.0], rel=0.01)
