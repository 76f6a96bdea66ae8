"""Columns: the walk against OBQ by its definition, descents against trying every change, and what happens to bad Hessians."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tightfit.formats.grids import TableGrid, fit_table
from tightfit.formats.ranges import range_grid
from tightfit.rehearse.meter import Meter
from tightfit.techniques import _columns
from tightfit.techniques._columns import Layer, descend, factor, polished, settle, walk, walked
from tightfit.techniques.gptq import GPTQ
from tightfit.techniques.lean import Lean
from tightfit.techniques.rtn import RTN
from tightfit.terms.errors import TightfitError


def layer(rows=12, columns=48, seed=0):
    """Weights, and the Hessian of inputs that lean on each other, some much larger than others."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, columns, generator=draw) @ torch.randn(columns, columns, generator=draw)
    inputs = inputs * torch.logspace(0, 1.5, columns)[torch.randperm(columns, generator=draw)]
    return Layer(torch.randn(rows, columns, generator=draw), 2 * inputs.t() @ inputs / 400)


def obq(weight, hessian, order, grid):
    """Quantize column after column; after each, the free ones take the optimal update of the OBQ paper (equation 3)."""
    weight, free = weight.double().clone(), list(order)
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    while free:
        inverse = torch.linalg.inv(hessian.double()[free][:, free])
        column = free[0]
        code, value = grid.nearest(column, weight[:, column].float())
        codes[:, column] = code
        error = (weight[:, column] - value.double()) / inverse[0, 0]
        weight[:, free] -= torch.outer(error, inverse[0])
        free = free[1:]
    return codes


@pytest.mark.parametrize("ordered", [True, False])
def test_the_walk_is_obq_in_a_fixed_order(ordered, monkeypatch):
    monkeypatch.setattr(_columns, "BLOCK", 10)  # so that errors cross blocks
    given = layer()
    found, grid = factor(given, 0.01, ordered), TableGrid(fit_table(given.weight, 3))
    damped = given.hessian + 0.01 * given.hessian.diagonal().mean() * torch.eye(48)
    expected = obq(given.weight, damped, found.order.tolist(), grid)
    assert (walk(given, found, grid) == expected).float().mean() > 0.99  # float32 against float64, ties apart
    assert found.order.tolist() == (damped.diagonal().argsort(descending=True, stable=True).tolist() if ordered else list(range(48)))


def test_a_layer_aims_at_what_the_dense_model_gave():
    draw = torch.Generator().manual_seed(3)
    weight, fed = torch.randn(8, 24, generator=draw), torch.randn(300, 24, generator=draw)
    dense_fed = fed + 0.3 * torch.randn(300, 24, generator=draw) @ torch.randn(24, 24, generator=draw)
    given, cross = Layer(weight, 2 * fed.t() @ fed / 300), 2 * dense_fed.t() @ fed / 300
    expected = torch.linalg.lstsq(fed.double(), (dense_fed @ weight.t()).double()).solution.t()
    found = factor(given, 1e-6, ordered=True)
    assert torch.allclose(given.aimed(cross, found, 1.0).weight.double(), expected, atol=1e-3)
    assert torch.allclose(given.aimed(cross, found, 0.5).weight.double(), (expected + weight) / 2, atol=1e-3)
    assert (expected - weight).abs().max() > 0.1


def test_each_row_keeps_the_grid_on_which_it_errs_least():
    given = layer(rows=40)
    found = factor(given, 0.1, ordered=True)
    grids = [TableGrid(fit_table(given.weight, 2, found.importance(power))) for power in (4.0, 0.0)]
    errors = torch.stack([given.damped(0.1).error(grid.dense(walk(given, found, grid))) for grid in grids])
    codes, grid = walked(given, found, grids)
    assert torch.equal(given.damped(0.1).error(grid.dense(codes)), errors.amin(dim=0))
    assert 0 < (errors.argmin(dim=0) == 1).sum() < 40  # else this would show nothing


def test_the_conditional_importance_is_the_inverse_given_the_columns_before():
    given = layer(columns=20)
    found = factor(given, 0.1, ordered=True)
    damped = (given.hessian + 0.1 * given.hessian.diagonal().mean() * torch.eye(20)).double()
    conditional, plain = found.importance(2.0).double(), found.plain_importance(1.0).double()
    inverse = torch.linalg.inv(damped)
    expected = torch.zeros(20, dtype=torch.float64)
    for place, column in enumerate(found.order.tolist()):
        free = found.order[place:]
        expected[column] = 1 / torch.linalg.inv(damped[free][:, free])[0, 0]
    assert torch.allclose(conditional / conditional[0], expected / expected[0], rtol=1e-3)
    alone = 1 / inverse.diagonal()
    assert torch.allclose((plain / plain.sum())[found.order], (alone / alone.sum())[found.order], rtol=1e-3)


def test_a_descent_ends_where_no_single_change_helps():
    given = layer(rows=4, columns=16)
    grid = TableGrid(fit_table(given.weight, 2))
    codes = torch.zeros(4, 16, dtype=torch.uint8)
    errors, pull = [given.error(grid.dense(codes))], given.pull(grid.dense(codes))
    for _ in range(30):
        codes, pull = descend(given, codes, grid, pull)
        errors.append(given.error(grid.dense(codes)))
    assert torch.allclose(pull, given.pull(grid.dense(codes)), atol=1e-4 * float(pull.abs().max()))  # carried along, it stays true
    assert all(bool((later <= before * (1 + 1e-5)).all()) for before, later in pairwise(errors))
    for column in range(16):
        for code in range(4):
            tried = codes.clone()
            tried[:, column] = code
            assert bool((given.error(grid.dense(tried)) >= errors[-1] * (1 - 1e-4)).all())


@pytest.mark.parametrize("ordered", [True, False])
def test_a_walk_knows_its_error(ordered):
    given = layer(rows=20)
    found, grid = factor(given, 0.05, ordered), TableGrid(fit_table(given.weight, 2))
    codes, error = _columns._walk(given, found, grid)
    assert torch.allclose(error, given.damped(0.05).error(grid.dense(codes)), rtol=1e-3)


@pytest.mark.parametrize("kind", ["table", "affine"])
def test_a_refit_that_helps_no_row_changes_nothing(kind, monkeypatch):
    given = layer(rows=20)
    grid = TableGrid(fit_table(given.weight, 2)) if kind == "table" else range_grid(given.weight, 2, 1, searched=True)
    codes = walk(given, factor(given, 0.01, ordered=True), grid)
    pull = given.pull(grid.dense(codes))
    worse = TableGrid(grid.table * 3) if kind == "table" else replace(grid, scale=grid.scale * 3)
    mixed = worse.where(torch.arange(20) < 10, grid.refitted(codes, pull.t(), given.hessian, torch.zeros(20)))
    monkeypatch.setattr(type(grid), "refitted", lambda *_: mixed)
    kept, left = _columns._refitted(given, codes, grid, pull, torch.zeros(20))
    assert torch.equal(kept.dense(codes)[:10], grid.dense(codes)[:10]) and torch.equal(left[:, :10], pull[:, :10])
    assert given.error(kept.dense(codes))[10:].sum() < given.error(grid.dense(codes))[10:].sum()
    assert torch.allclose(left, given.pull(kept.dense(codes)), atol=1e-4 * float(pull.abs().max()))


@pytest.mark.parametrize("kind", ["table", "affine"])
def test_turns_after_the_walk_never_raise_the_error(kind):
    given = layer(rows=20)
    grid = TableGrid(fit_table(given.weight, 2)) if kind == "table" else range_grid(given.weight, 2, 1, searched=True)
    codes = walk(given, factor(given, 0.01, ordered=True), grid)
    before = given.error(grid.dense(codes))
    after, refitted = polished(given, codes, grid, 3)
    assert bool((given.error(refitted.dense(after)) <= before * (1 + 1e-5)).all())
    assert given.error(refitted.dense(after)).sum() < 0.9 * before.sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lean_is_ahead_of_gptq_and_gptq_of_rounding(bits):
    from tightfit.formats.affine import AffineCodec
    from tightfit.formats.table import TableCodec

    given = layer(rows=32, columns=64)
    codecs = {RTN: AffineCodec(bits), GPTQ: AffineCodec(bits), Lean: TableCodec(bits)}
    errors = [
        given.error(codec.decode(kind(bits=bits).solve(given.weight, given.hessian), (32, 64), 0, 32, torch.float32)).sum()
        for kind, codec in codecs.items()
    ]
    assert errors[2] < 0.8 * errors[1] < 0.64 * errors[0]


def test_columns_that_were_never_fed_become_nought():
    given = layer(rows=4, columns=16)
    hessian = given.hessian.clone()
    hessian[3], hessian[:, 3] = 0.0, 0.0
    settled = settle(given.weight, hessian)
    others = hessian.diagonal()[[at for at in range(16) if at != 3]].mean()
    assert bool((settled.weight[:, 3] == 0).all()) and settled.hessian[3, 3] == others and hessian[3, 3] == 0


def test_a_damping_that_does_not_suffice_is_raised():
    one = torch.ones(8, 8, dtype=torch.float32) * 1e8
    one[0, 1] = one[1, 0] = 1.2e8  # not positive, a little off
    assert factor(Layer(torch.randn(2, 8), one), 1e-3, ordered=False).damping > 1e-3
    one[0, 1] = one[1, 0] = 1e12
    with pytest.raises(TightfitError, match="singular, even with a damping of 1"):
        factor(Layer(torch.randn(2, 8), one), 1e-3, ordered=False)


@pytest.mark.parametrize("side", ["weight", "hessian"])
def test_what_is_not_finite_is_refused(side):
    given = {"weight": torch.ones(2, 4), "hessian": torch.eye(4)}
    given[side][0, 0] = float("nan")
    with pytest.raises(TightfitError, match="finite"):
        settle(**given)


@pytest.mark.parametrize(("rows", "columns"), [(1024, 1024), (2048, 512), (256, 1024)])
@pytest.mark.parametrize("technique", [GPTQ(), Lean(), Lean(grid="affine")])
def test_what_solving_takes_is_foreseen(technique, rows, columns):
    given = layer(rows, columns)
    with Meter() as meter:
        meter.phase = "solve"
        technique.solve(given.weight, given.hessian)
    taken = max(sum(parts.values()) for parts in meter.footprint().phases.values())
    assert 0.3 * technique.solve_bytes(rows, columns) < taken <= technique.solve_bytes(rows, columns)
