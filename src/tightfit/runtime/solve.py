"""Solve: fill a layer of few bits with what the technique finds for its inputs, or with what rounding gives. Errors say which layer."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from tightfit.contracts import Solves
from tightfit.formats.experts import QuantizedExperts
from tightfit.formats.linear import QuantizedLinear
from tightfit.terms.errors import TightfitError


def solve_linear(technique: Solves, path: str, dense: nn.Module, layer: QuantizedLinear, hessian: Tensor, cross: Tensor | None) -> None:
    """Fill `layer` with the solved weight of `dense`. Raises `TightfitError` with the layer's path in front."""
    layer.keep(solved(technique, path, dense.weight.t() if layer.transposed else dense.weight, hessian, cross))
    if dense.bias is not None:
        layer.absorb("bias", dense.bias)


def absorb(path: str, dense: nn.Module, layer: QuantizedLinear | QuantizedExperts) -> None:
    """Fill `layer` with the rounded weights of `dense`. Raises `TightfitError` with the layer's path in front."""
    with located(path):
        for name, parameter in dense.named_parameters():
            layer.absorb(name, parameter)


def solved(technique: Solves, path: str, weight: Tensor, hessian: Tensor, cross: Tensor | None) -> tuple[Tensor, ...]:
    """The stored tensors of a weight of any dtype. Raises `TightfitError` with the path in front.

    # weight (rows, columns); hessian and cross (columns, columns) float32
    """
    with located(path):
        return technique.solve(weight.float().contiguous(), hessian, cross)


@contextmanager
def located(path: str) -> Iterator[None]:
    """Put the path in front of an error."""
    try:
        yield
    except TightfitError as error:
        raise TightfitError(f"`{path}`: {error}", hint=error.hint) from error
