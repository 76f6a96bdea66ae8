"""Refit: steps against the normal equations solved outright."""

from itertools import pairwise

import pytest
import torch

from tightfit.formats import refit
from tightfit.formats.refit import best_change

ROWS, COLUMNS = 5, 40


def problem(values):
    """A Hessian with a channel far stronger than the others, and codes of so many values.  # → C (rows, columns, values), pull, hessian"""
    draw = torch.Generator().manual_seed(values)
    root = torch.randn(COLUMNS, COLUMNS, generator=draw)
    root[:, 3] *= 30
    hessian = root.t() @ root / COLUMNS + 0.1 * torch.eye(COLUMNS)
    codes = torch.randint(values, (ROWS, COLUMNS), generator=draw)
    codes[:, :values] = torch.arange(values)  # each occurs
    return torch.nn.functional.one_hot(codes, values).float(), torch.randn(ROWS, COLUMNS, generator=draw) @ hessian, hessian


def found(design, pull, hessian, enough):
    def decode(change):
        return torch.einsum("rcv,rv->rc", design, change.float())

    def sums(dense):
        return torch.einsum("rcv,rc->rv", design.double(), dense.double())

    return best_change(decode, sums, pull, hessian, torch.full((ROWS,), enough)).double()


def gains(design, pull, hessian, change):
    """By how much each row's error falls.  # → (rows,)"""
    moved = torch.einsum("rcv,rv->rc", design.double(), change)
    return (moved * (2 * pull.double() - moved @ hessian.double())).sum(dim=1)


def outright(design, pull, hessian):
    wide = design.double()
    products = torch.einsum("rcv,cd,rdw->rvw", wide, hessian.double(), wide)
    return torch.linalg.solve(products, torch.einsum("rcv,rc->rv", wide, pull.double()))


@pytest.mark.parametrize("values", [1, 4, 8])
def test_few_values_end_at_the_optimum(values):
    given = problem(values)
    assert torch.allclose(found(*given, 0.0), outright(*given), rtol=1e-3, atol=1e-3)


def test_each_step_gains_and_the_last_come_close():
    given = problem(16)
    best, steps = gains(*given, outright(*given)), []
    for most in range(1, refit.STEPS + 1):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(refit, "STEPS", most)
            steps.append(gains(*given, found(*given, 0.0)))
    assert all(bool((later > before).all()) for before, later in pairwise(steps))
    assert bool((steps[-1] > 0.95 * best).all()) and bool((steps[0] < 0.95 * best).all())


def test_it_ends_when_a_step_gains_no_more_than_is_enough():
    given = problem(16)
    one, all_of_them = (gains(*given, found(*given, enough)).sum() for enough in (1e9, 0.0))
    gained = float(one) / ROWS
    assert gains(*given, found(*given, gained * 1.01)).sum() == one < gains(*given, found(*given, gained * 0.99)).sum() <= all_of_them
