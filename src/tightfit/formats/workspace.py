"""Workspace: what operators allocate inside, where no dispatch mode can see it, and how much work they do.

The meter of `rehearse/` consults these tables. They hold upper bounds where the bytes depend on data (on routing).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from tightfit.formats.codec import device_of
from tightfit.formats.experts import TOKENS, QuantizedExperts, module_of
from tightfit.formats.int8 import int8pack_bytes
from tightfit.formats.kernels import affine_decode_bytes, padded_bytes, table_decode_bytes
from tightfit.formats.packing import padded_columns

_GATE_ROWS = {"plain": (2, 5), "own": (5, 7)}
"""Rows as wide as an expert that a gate allocates, in its forward pass (all kept for the backward pass, the result among them) and at
most in both. Measured; `own`: gates that a model brings itself, GPT-OSS's being the hungriest."""

Arguments = tuple[Any, ...]
"""An operator's positional arguments."""


def experts_bytes(module: QuantizedExperts, device: str, dtype: torch.dtype, tokens: int, choices: int, backward: bool) -> int:
    """Most bytes that the operator allocates beside its results, when every token chooses the same expert."""
    n = min(tokens, TOKENS)
    first, second = (module.shapes[name] for name in module.matrices)
    row = n * dtype.itemsize
    up, inner, outer = row * first[0], row * second[1], row * second[0]
    product, transposed = module.codec.product_bytes, module.codec.transposed_bytes
    plain = module.apply_gate is None or module.apply_gate.__module__ == "transformers.integrations.moe"
    gate, gate_backward = (inner * rows for rows in _GATE_ROWS["plain" if plain else "own"])
    sorting = 8 * (2 * tokens * choices + 2 * n + 2 * module.num_experts)
    reading = row * first[1] + up + product(device, dtype, n, first)
    if backward:
        arriving = up + gate + outer + inner
        phases = (
            reading,
            arriving + transposed(device, dtype, second),
            arriving + max(inner, outer if module.has_bias else 0),
            up + gate_backward + 2 * inner,
            up + outer + transposed(device, dtype, first),
        )
    else:
        weighted = 4 * n * second[0]  # routing weights are often in float32, and so is their product then
        phases = (reading, up + gate, inner + outer + product(device, dtype, n, second), 2 * outer + weighted)
    return sorting + max(phases)


def _forward_bytes(args: Arguments, kwargs: Mapping[str, Any]) -> int:
    hidden, index, *_, module = args
    return experts_bytes(module_of(module), device_of(hidden), hidden.dtype, *index.shape, backward=False)


def _backward_bytes(args: Arguments, kwargs: Mapping[str, Any]) -> int:
    _, hidden, index, *_, module = args
    return experts_bytes(module_of(module), device_of(hidden), hidden.dtype, *index.shape, backward=True)


def _int8pack_bytes(args: Arguments, kwargs: Mapping[str, Any]) -> int:
    x, codes, _ = args
    return int8pack_bytes(x.shape[0], tuple(codes.shape), x.dtype) if device_of(x) == "cuda" else 0


def _padded_bytes(args: Arguments, kwargs: Mapping[str, Any]) -> int:
    x, *_ = args
    return padded_bytes(*x.shape, x.dtype)


def _table_decode_bytes(args: Arguments, kwargs: Mapping[str, Any]) -> int:
    packed, table, columns, dtype = args
    return table_decode_bytes(packed.shape[0], columns, table.shape[1].bit_length() - 1, dtype)


def _affine_decode_bytes(args: Arguments, kwargs: Mapping[str, Any]) -> int:
    packed, _scale, _zero, columns, dtype = args
    return affine_decode_bytes(packed.shape[0], columns, 8 * packed.shape[1] // padded_columns(columns), dtype)


WORKSPACE: dict[Any, Callable[[Arguments, Mapping[str, Any]], int]] = {
    torch.ops.tightfit.experts.default: _forward_bytes,
    torch.ops.tightfit.experts_backward.default: _backward_bytes,
    torch.ops.aten._weight_int8pack_mm.default: _int8pack_bytes,
    torch.ops.tightfit.rehearsed_product.default: lambda args, kwargs: args[4],
    torch.ops.tightfit.table_product.default: _padded_bytes,
    torch.ops.tightfit.affine_product.default: _padded_bytes,
    torch.ops.tightfit.table_decode.default: _table_decode_bytes,
    torch.ops.tightfit.affine_decode.default: _affine_decode_bytes,
}
"""Operator → bytes that it allocates beside its results, from its arguments."""


def _experts_touched(args: Arguments, kwargs: Mapping[str, Any]) -> int:
    *_, index, _weights, stored, _module = args
    hit = min(index.numel(), stored[0].shape[0]) / stored[0].shape[0]
    return int(sum(tensor.nbytes for tensor in stored) * hit) + sum(tensor.nbytes for tensor in args[: len(args) - 2])


def _product_touched(args: Arguments, kwargs: Mapping[str, Any]) -> int:
    x, stored, rows, columns, *_ = args
    decoded = rows * columns * x.element_size()  # written to a slice and read from it; a slice of the CPU's stays in its cache
    return x.nbytes + sum(tensor.nbytes for tensor in stored) + x.shape[0] * rows * x.element_size() + decoded


TOUCHED: dict[Any, Callable[[Arguments, Mapping[str, Any]], int]] = {
    torch.ops.tightfit.experts.default: _experts_touched,
    torch.ops.tightfit.experts_backward.default: _experts_touched,
    torch.ops.tightfit.rehearsed_product.default: _product_touched,
}
"""Operator → bytes that it reads, where that is less than all of its arguments: experts that no token chooses stay untouched."""


@register_flop_formula(torch.ops.tightfit.rehearsed_product, get_raw=True)
def _product_flops(x: Any, stored: Any, rows: int, columns: int, slice_bytes: int, transposed: bool, **kwargs: Any) -> int:
    return 2 * x.shape[0] * rows * columns


@register_flop_formula(torch.ops.tightfit.experts, get_raw=True)
def _forward_flops(hidden: Any, index: Any, weights: Any, stored: Any, module: int, **kwargs: Any) -> int:
    return 2 * index.numel() * sum(rows * columns for rows, columns in module_of(module).shapes.values())


@register_flop_formula(torch.ops.tightfit.experts_backward, get_raw=True)
def _backward_flops(grad: Any, hidden: Any, index: Any, weights: Any, stored: Any, module: int, **kwargs: Any) -> int:
    first, second = (rows * columns for rows, columns in module_of(module).shapes.values())
    return 2 * index.numel() * (2 * first + second)


def _int8pack_flops(x: Any, codes: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x.shape[0] * codes.numel()


flop_registry.setdefault(torch.ops.aten._weight_int8pack_mm, _int8pack_flops)  # a later torch may bring its own
