"""Portable: the same products and decoding in plain torch, on any device and for every dtype. What the kernels are held against."""

from collections.abc import Callable

import torch
from torch import Tensor

from tightfit.formats.codec import row_slices
from tightfit.formats.packing import unpack

SLICE_CODES = 1 << 19
"""Codes that are decoded at a time, or one row where that is more."""


def table_decode(packed: Tensor, table: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """`table[row, code]`.  # (rows, packed_bytes) int8, (rows, 2^bits) bfloat16 → (rows, columns)"""
    dense = torch.empty(packed.shape[0], columns, dtype=dtype, device=packed.device)
    for start, stop in _slices(*dense.shape):
        _look_up(packed[start:stop], table[start:stop], dense[start:stop])
    return dense


def _look_up(packed: Tensor, table: Tensor, dense: Tensor) -> None:
    bits = table.shape[1].bit_length() - 1
    places = unpack(packed, dense.shape[1], bits).to(torch.int32)
    places += torch.arange(0, len(dense) << bits, 1 << bits, dtype=torch.int32, device=packed.device)[:, None]
    torch.index_select(table.to(dense.dtype).flatten(), 0, places.flatten(), out=dense.view(-1))


def affine_decode(packed: Tensor, scale: Tensor, zero: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """`scale · (code - zero)` in float32, then rounded.

    # (rows, packed_bytes) int8, (rows, groups) bfloat16, (rows, groups) uint8 → (rows, columns)
    """
    dense = torch.empty(packed.shape[0], columns, dtype=dtype, device=packed.device)
    for start, stop in _slices(*dense.shape):
        _scale(packed[start:stop], scale[start:stop], zero[start:stop], dense[start:stop])
    return dense


def _scale(packed: Tensor, scale: Tensor, zero: Tensor, dense: Tensor) -> None:
    weights = unpack(packed, dense.shape[1], affine_bits(packed, dense.shape[1])).to(torch.float32)
    weights.view(*scale.shape, -1).sub_(zero[:, :, None].float()).mul_(scale[:, :, None].float())
    dense.copy_(weights)


def _slices(rows: int, columns: int) -> list[tuple[int, int]]:
    return row_slices(rows, max(columns, 1), 1, SLICE_CODES)


def affine_bits(packed: Tensor, columns: int) -> int:
    """The width of a code, from what a row takes."""
    return packed.shape[1] // (2 * -(-columns // 16))


def decode_bytes(rows: int, columns: int, bits: int, dtype: torch.dtype) -> int:
    """Most bytes that either holds beside its result: a slice's codes with the same in four bytes, and its tables."""
    part = min(rows, max(SLICE_CODES // max(columns, 1), 1))
    return part * (5 * columns + (4 + (dtype.itemsize << bits)))


def product(x: Tensor, rows: int, row_bytes: int, decode: Callable[[int, int], Tensor]) -> Tensor:
    """`x @ dense.T` with slices of rows that `decode(start, stop)` makes.  # (tokens, columns) → (tokens, rows)"""
    result = x.new_empty(x.shape[0], rows)
    for start, stop in row_slices(rows, row_bytes, 1, 8 * SLICE_CODES):
        torch.mm(x, decode(start, stop).t(), out=result[:, start:stop])
    return result
