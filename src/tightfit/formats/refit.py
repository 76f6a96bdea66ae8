"""Refit: the least squares of a grid's values while its codes stay, by products with the Hessian alone.

A row's weights are C·v, v its values and C what its codes say. The best change of v solves `(CᵀHC) change = Cᵀ pull`, pull being what H
makes of the present error. Forming CᵀHC would cost a product with H for every value; conjugate gradients take one a step, and few steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 8
"""At most: the optimum up to 3 bits. Where inputs are alike two do; after massive activations all are needed at first."""


def best_change(
    decode: Callable[[Tensor], Tensor], sums: Callable[[Tensor], Tensor], pull: Tensor, hessian: Tensor, enough: Tensor
) -> Tensor:
    """What to add to each row's values; it ends with a step that lowers the rows' errors by no more than `enough`, all taken together.

    All that belongs to values is in float64, so that the order in which a GPU adds leaves no trace.
    # decode: C, (rows, values) → (rows, columns); sums: Cᵀ, the way back, float64; pull (rows, columns), enough (rows,) → (rows, values)
    """
    residual, limit = sums(pull), float(enough.sum())
    diagonal = sums(decode(torch.ones_like(residual)) * hessian.diagonal()).clamp(min=1e-30)  # as if no two columns were alike
    change, direction, before = torch.zeros_like(residual), torch.zeros_like(residual), 1.0
    for _ in range(min(residual.shape[1], STEPS)):
        scaled = residual / diagonal
        size = (residual * scaled).sum(dim=1, keepdim=True)
        direction = scaled + size / before * direction
        product = sums(decode(direction) @ hessian)
        length = size / (direction * product).sum(dim=1, keepdim=True).clamp(min=1e-30)
        change, residual, before = change + length * direction, residual - length * product, size.clamp(min=1e-30)
        if float((length * size).sum()) <= limit:
            break
    return change.float()
