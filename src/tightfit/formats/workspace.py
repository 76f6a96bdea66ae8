"""Workspace: what operators allocate inside, where no dispatch mode can see it, and how much work they do.

The meter of `rehearse/` consults these tables. They hold upper bounds where the bytes depend on data (on routing).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from tightfit.formats.codec import device_of
from tightfit.formats.experts import module_of, workspace_bytes
from tightfit.formats.int8 import int8pack_bytes

Arguments = tuple[Any, ...]
"""An operator's positional arguments."""


def _experts_bytes(args: Arguments, kwargs: Mapping[str, Any]) -> int:
    hidden, index, *_, module = args
    return workspace_bytes(module_of(module), device_of(hidden), hidden.dtype, *index.shape, backward=False)


def _experts_backward_bytes(args: Arguments, kwargs: Mapping[str, Any]) -> int:
    _, hidden, index, *_, module = args
    return workspace_bytes(module_of(module), device_of(hidden), hidden.dtype, *index.shape, backward=True)


def _int8pack_bytes(args: Arguments, kwargs: Mapping[str, Any]) -> int:
    x, codes, _ = args
    return int8pack_bytes(x.shape[0], tuple(codes.shape), x.dtype) if device_of(x) == "cuda" else 0


WORKSPACE: dict[Any, Callable[[Arguments, Mapping[str, Any]], int]] = {
    torch.ops.tightfit.experts.default: _experts_bytes,
    torch.ops.tightfit.experts_backward.default: _experts_backward_bytes,
    torch.ops.aten._weight_int8pack_mm.default: _int8pack_bytes,
}
"""Operator → bytes that it allocates beside its results, from its arguments."""


def _experts_touched(args: Arguments, kwargs: Mapping[str, Any]) -> int:
    *_, index, _weights, stored, _module = args
    hit = min(index.numel(), stored[0].shape[0]) / stored[0].shape[0]
    return int(sum(tensor.nbytes for tensor in stored) * hit) + sum(tensor.nbytes for tensor in args[: len(args) - 2])


TOUCHED: dict[Any, Callable[[Arguments, Mapping[str, Any]], int]] = {
    torch.ops.tightfit.experts.default: _experts_touched,
    torch.ops.tightfit.experts_backward.default: _experts_touched,
}
"""Operator → bytes that it reads, where that is less than all of its arguments: experts that no token chooses stay untouched."""


@register_flop_formula(torch.ops.tightfit.experts, get_raw=True)
def _experts_flops(hidden: Any, index: Any, weights: Any, stored: Any, module: int, **kwargs: Any) -> int:
    return 2 * index.numel() * sum(rows * columns for rows, columns in module_of(module).shapes.values())


@register_flop_formula(torch.ops.tightfit.experts_backward, get_raw=True)
def _experts_backward_flops(grad: Any, hidden: Any, index: Any, weights: Any, stored: Any, module: int, **kwargs: Any) -> int:
    first, second = (rows * columns for rows, columns in module_of(module).shapes.values())
    return 2 * index.numel() * (2 * first + second)


@register_flop_formula(torch.ops.aten._weight_int8pack_mm)
def _int8pack_flops(x: Any, codes: Any, scale: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * codes[0] * codes[1]
