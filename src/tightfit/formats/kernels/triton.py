"""GPU kernels in Triton, on the same layout: products for few tokens, and decoding for many. Needs `triton`; `cpu.py` imports it then only.

Not yet run on a GPU: checked with Triton's interpreter (`TRITON_INTERPRET=1`), which knows no speed. A table's values are looked up through
the first-level cache, where a row's 32 bytes are one line.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.formats.kernels import portable
from tightfit.formats.packing import DEPTH, LANES, padded_columns

FEW_TOKENS = 4
"""Most tokens for which the codes are read once for each; more are multiplied with slices of decoded rows."""

_ROWS = 4
"""Rows of a program: they share the inputs that are loaded."""

_CHUNKS = 4
"""Chunks of 512 columns that a program takes at a time: 128 lanes, for four warps."""

_WARPS = 4


@triton.jit
def _codes(words, mask, K: tl.constexpr, BITS: tl.constexpr, STRIDE: tl.constexpr):
    """The K-th codes of some lanes. `words` points to their first words; the next are STRIDE further."""
    if BITS == 3 and K == 15:
        low = tl.load(words, mask=mask, other=0).to(tl.int32)
        middle = tl.load(words + STRIDE, mask=mask, other=0).to(tl.int32)
        high = tl.load(words + 2 * STRIDE, mask=mask, other=0).to(tl.int32)
        codes = (low >> 15 & 1) | (middle >> 14 & 2) | (high >> 13 & 4)
    else:
        word = tl.load(words + K // (16 // BITS) * STRIDE, mask=mask, other=0).to(tl.int32)
        codes = word >> (K % (16 // BITS) * BITS) & ((1 << BITS) - 1)
    return codes


@triton.jit
def _weights(codes, mask, row, column, grid, zero, groups, group, BITS: tl.constexpr, AFFINE: tl.constexpr, DTYPE: tl.constexpr):
    """What codes (rows, lanes) stand for, in DTYPE."""
    if AFFINE:
        at = row * groups + column // group
        scale = tl.load(grid + at, mask=mask, other=0).to(tl.float32)
        offset = tl.load(zero + at, mask=mask, other=0).to(tl.float32)
        weights = (scale * (codes.to(tl.float32) - offset)).to(DTYPE)
    else:
        weights = tl.load(grid + (row << BITS) + codes, mask=mask, other=0).to(DTYPE)
    return weights


@triton.jit
def _add_chunk(
    total, x, words, inside, row, first, columns, grid, zero, groups, group, BITS: tl.constexpr, AFFINE: tl.constexpr, STRIDE: tl.constexpr
):
    """Add the products of one chunk's lanes, whose first columns are `first`.  # total (rows, lanes) float32"""
    for k in tl.static_range(16):
        column = first + k * STRIDE
        values = tl.load(x + column, mask=column < columns, other=0)
        codes = _codes(words, inside, k, BITS, STRIDE)
        weights = _weights(codes, inside, row, column[None, :], grid, zero, groups, group, BITS, AFFINE, x.dtype.element_ty)
        total += weights.to(tl.float32) * values.to(tl.float32)[None, :]
    return total


@triton.jit
def _product_kernel(
    x, packed, grid, zero, out, rows, columns, padded, groups, group,
    BITS: tl.constexpr, AFFINE: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """ROWS rows times one token. REST: lanes after the whole chunks."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    token = tl.program_id(1).to(tl.int64)
    x += token * columns
    words = packed + row * (padded // 16 * BITS)
    whole = padded // 512
    lane = tl.arange(0, CHUNKS * 32)
    total = tl.zeros((ROWS, CHUNKS * 32), tl.float32)
    for chunk in range(0, whole, CHUNKS):
        which = chunk + lane // 32
        first = which * 512 + lane % 32
        inside = (row < rows) & (which < whole)[None, :]
        place = words + (which * 32 * BITS + lane % 32)[None, :]
        first = tl.where(which < whole, first, columns)
        total = _add_chunk(total, x, place, inside, row, first, columns, grid, zero, groups, group, BITS, AFFINE, 32)
    result = tl.sum(total, axis=1)
    start = whole * 512
    for digit in tl.static_range(5):
        if REST & (16 >> digit):
            lane = tl.arange(0, 16 >> digit)
            inside = (row < rows) & (lane < (16 >> digit))[None, :]
            place = words + (start // 16 * BITS + lane)[None, :]
            rest = tl.zeros((ROWS, 16 >> digit), tl.float32)
            rest = _add_chunk(rest, x, place, inside, row, start + lane, columns, grid, zero, groups, group, BITS, AFFINE, 16 >> digit)
            result += tl.sum(rest, axis=1)
            start += 16 * (16 >> digit)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(out + token * rows + row, result.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def _store_chunk(
    out, words, inside, row, first, columns, grid, zero, groups, group, BITS: tl.constexpr, AFFINE: tl.constexpr, STRIDE: tl.constexpr
):
    """Decode one chunk's lanes of some rows. `out` points to the rows."""
    for k in tl.static_range(16):
        column = (first + k * STRIDE)[None, :]
        mask = inside & (column < columns)
        codes = _codes(words, mask, k, BITS, STRIDE)
        weights = _weights(codes, mask, row, column, grid, zero, groups, group, BITS, AFFINE, out.dtype.element_ty)
        tl.store(out + column, weights, mask=mask)


@triton.jit
def _store_rest(
    out, words, row, rows, columns, padded, grid, zero, groups, group, BITS: tl.constexpr, AFFINE: tl.constexpr, REST: tl.constexpr
):
    """Decode what comes after the whole chunks of some rows."""
    start = padded // 512 * 512
    for digit in tl.static_range(5):
        if REST & (16 >> digit):
            lane = tl.arange(0, 16 >> digit)
            place = words + (start // 16 * BITS + lane)[None, :]
            inside = (row < rows) & (lane < (16 >> digit))[None, :]
            _store_chunk(out, place, inside, row, start + lane, columns, grid, zero, groups, group, BITS, AFFINE, 16 >> digit)
            start += 16 * (16 >> digit)


@triton.jit
def _decode_kernel(
    packed, grid, zero, out, rows, columns, padded, groups, group,
    BITS: tl.constexpr, AFFINE: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one whole chunk, or of all that comes after the whole ones."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    words = packed + row * (padded // 16 * BITS)
    out += row * columns
    chunk = tl.program_id(1)
    if chunk < padded // 512:
        lane = tl.arange(0, 32)
        place = words + (chunk * 32 * BITS + lane)[None, :]
        inside = (row < rows) & (lane < 32)[None, :]
        _store_chunk(out, place, inside, row, chunk * 512 + lane, columns, grid, zero, groups, group, BITS, AFFINE, 32)
    else:
        _store_rest(out, words, row, rows, columns, padded, grid, zero, groups, group, BITS, AFFINE, REST)


def table_product(x: Tensor, packed: Tensor, table: Tensor) -> Tensor:
    """As in `cpu.py`. Few tokens allocate nothing beside the result; more, what `portable.product` takes, without its codes."""
    columns = x.shape[1]
    if x.shape[0] <= FEW_TOKENS:
        return _product(x, packed, table, None, table.shape[1].bit_length() - 1)
    decode = lambda start, stop: table_decode(packed[start:stop], table[start:stop], columns, x.dtype)  # noqa: E731
    return portable.product(x, packed.shape[0], columns * x.element_size(), decode)


def affine_product(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """As in `cpu.py`."""
    columns = x.shape[1]
    if x.shape[0] <= FEW_TOKENS:
        return _product(x, packed, scale, zero, portable.affine_bits(packed, columns))
    decode = lambda start, stop: affine_decode(packed[start:stop], scale[start:stop], zero[start:stop], columns, x.dtype)  # noqa: E731
    return portable.product(x, packed.shape[0], columns * x.element_size(), decode)


def table_decode(packed: Tensor, table: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """As in `cpu.py`."""
    return _decode(packed, table, None, columns, dtype, table.shape[1].bit_length() - 1)


def affine_decode(packed: Tensor, scale: Tensor, zero: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """As in `cpu.py`."""
    return _decode(packed, scale, zero, columns, dtype, portable.affine_bits(packed, columns))


def _product(x: Tensor, packed: Tensor, grid: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    tokens, columns = x.shape
    result = x.new_empty(tokens, packed.shape[0])
    if result.numel() > 0:
        places = (-(-packed.shape[0] // _ROWS), tokens)
        arguments, constants = _arguments(packed, grid, zero, columns, bits)
        inputs = x.contiguous()
        _product_kernel[places](inputs, *arguments[:3], result, *arguments[3:], **constants, CHUNKS=_CHUNKS, num_warps=_WARPS)
    return result


def _decode(packed: Tensor, grid: Tensor, zero: Tensor | None, columns: int, dtype: torch.dtype, bits: int) -> Tensor:
    dense = torch.empty(packed.shape[0], columns, dtype=dtype, device=packed.device)
    if dense.numel() > 0:
        places = (-(-packed.shape[0] // _ROWS), -(-padded_columns(columns) // (DEPTH * LANES)))
        arguments, constants = _arguments(packed, grid, zero, columns, bits)
        _decode_kernel[places](*arguments[:3], dense, *arguments[3:], **constants, num_warps=_WARPS)
    return dense


def _arguments(packed: Tensor, grid: Tensor, zero: Tensor | None, columns: int, bits: int) -> tuple[list[object], dict[str, object]]:
    """What both kernels take: tensors and numbers, and constants. Words must begin at an even byte."""
    even = packed.contiguous() if packed.storage_offset() % 2 == 0 else packed.clone()
    padded = padded_columns(columns)
    groups = grid.shape[1]
    group = columns // groups if groups > 1 else 1 << 30
    rest = padded // DEPTH % LANES
    numbers = [packed.shape[0], columns, padded, groups, group]
    tensors = [even.view(torch.int16), grid.contiguous(), grid if zero is None else zero.contiguous()]
    return [*tensors, *numbers], {"BITS": bits, "AFFINE": zero is not None, "REST": rest, "ROWS": _ROWS}
