"""CPU kernels: the shared library of `table.c`, and the operators through which products and decoding go, on whatever device.

The library needs AVX-512 with bfloat16, for 2, 3 and 4 bits. Everything else takes plain torch, and says so once.

What a product allocates beside its result: where 16 does not divide the columns, a padded copy of `x` (`padded_bytes`); also where `x`
is not contiguous. Decoding: nothing; where there is no kernel, what `portable.decode_bytes` says. Threads take nothing more.
"""

import ctypes
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tightfit.formats.kernels import portable
from tightfit.formats.packing import DEPTH, padded_columns

log = logging.getLogger(__name__)

LIBRARY = Path(__file__).with_name("_table.so")
"""Where `hatch_build.py` puts what it makes of `table.c`."""

CONTRACT = 1
"""Of the library's functions: one that was built from another `table.c` is not called."""

KERNEL_BITS = (2, 3, 4)
"""Widths whose values fit into a register."""

KERNEL_DTYPES = (torch.bfloat16, torch.float32)
"""Of inputs and of what is decoded, on a CPU."""

KERNEL_TOKENS = {"cpu": 64, "cuda": 4}
"""Most tokens for which a product by kernel beats slices of decoded rows. CPU, 4 bits, 4096 x 4096, one thread, in times of dense
bfloat16 (`bench/kernels`): tables 0.6 against 1.5 at 16 tokens, 0.9 against 1.3 at 64, 1.1 against 1.1 at 256; groups of 128 1.3 at 64
and 1.5 at 256. CUDA: not measured."""

GROUP_STEP = 32
"""What groups of columns are multiples of, unless the row is one group."""

SHARED_WEIGHTS = 1 << 18
"""Least weights for every thread: fewer take less time than waking one."""


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        return None, "it was not built: `python hatch_build.py` in a checkout does so where there is a C compiler"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        if library.tightfit_contract() != CONTRACT:
            return None, "it belongs to another version: `python hatch_build.py` in a checkout builds it anew"
    except (OSError, AttributeError) as fault:
        return None, str(fault)
    if not library.tightfit_supported():
        return None, "this CPU lacks AVX-512 with bfloat16"
    number, size, place = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.tightfit_product.argtypes = [number, number, *[size] * 6, *[place] * 5]
    library.tightfit_decode.argtypes = [number, number, *[size] * 4, *[place] * 4]
    library.tightfit_product.restype = library.tightfit_decode.restype = None
    return library, ""


def has_kernel(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether this installation has kernels for `device` (`cpu`, `cuda`) and inputs of `dtype`, and a CPU for them."""
    if device == "cuda":
        return _has_triton() and dtype in (torch.bfloat16, torch.float32, torch.float16)
    return device == "cpu" and dtype in KERNEL_DTYPES and _library()[0] is not None


def has_product(bits: int, device: str, dtype: torch.dtype, tokens: int) -> bool:
    """Whether a kernel multiplies `tokens` rows of `dtype` with codes of `bits`, faster than slices of decoded rows."""
    return bits in KERNEL_BITS and has_kernel(device, dtype) and 0 < tokens <= KERNEL_TOKENS[device]


@cache
def _say_portable(reason: str) -> None:
    log.warning("few-bit weights are multiplied without the CPU kernel, which is slower: %s", reason)


def _kernel_for(bits: int, tensor: Tensor, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The library where it serves these; else None, and the reason is said if the user can change it."""
    if not tensor.is_cpu or bits not in KERNEL_BITS or dtype not in KERNEL_DTYPES:
        return None
    library, reason = _library()
    if library is None:
        _say_portable(reason)
    return library


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _gpu_for(bits: int, tensor: Tensor, dtype: torch.dtype) -> ModuleType | None:
    """The GPU kernels where they serve these."""
    if not tensor.is_cuda or bits not in KERNEL_BITS or dtype.itemsize > 4 or not _has_triton():
        return None
    from tightfit.formats.kernels import triton  # takes a second, and is not everywhere

    return triton


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="few-bit-product")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has the pool, but not its threads


def _share(rows: int, columns: int, work: Callable[[int, int], None]) -> None:
    """`work(start, stop)` for all rows, on as many threads as torch may use. The kernels let go of Python's lock."""
    threads = min(torch.get_num_threads(), max(rows * columns // SHARED_WEIGHTS, 1))
    if threads == 1:
        return work(0, rows)
    bounds = [rows * part // threads for part in range(threads + 1)]
    others = [_pool(threads - 1).submit(work, bounds[part], bounds[part + 1]) for part in range(1, threads)]
    work(0, bounds[1])
    for other in others:
        other.result()


def padded_bytes(tokens: int, columns: int, dtype: torch.dtype) -> int:
    """Bytes that a product by kernel allocates beside its result for contiguous `x`."""
    return tokens * padded_columns(columns) * dtype.itemsize if columns % DEPTH else 0


def table_decode_bytes(rows: int, columns: int, bits: int, dtype: torch.dtype) -> int:
    """Most bytes that `table_decode` allocates beside its result, where tensors lie for which this installation is made."""
    fast = bits in KERNEL_BITS and dtype in KERNEL_DTYPES and (has_kernel() or has_kernel("cuda"))
    return 0 if fast else portable.decode_bytes(rows, columns, bits, dtype)


affine_decode_bytes = table_decode_bytes
"""The same of `affine_decode`."""


def _product(library: ctypes.CDLL, bits: int, x: Tensor, packed: Tensor, grid: Tensor, zero: Tensor | None) -> Tensor:
    """`x @ dense.T` by the library."""
    (tokens, columns), rows = x.shape, packed.shape[0]
    _check(bits, packed, grid, zero, columns)
    if columns % DEPTH:
        padded = x.new_zeros(tokens, padded_columns(columns))
        padded[:, :columns] = x
    else:
        padded = x.contiguous()
    result = x.new_empty(tokens, rows)
    places = (padded.data_ptr(), packed.data_ptr(), grid.data_ptr(), zero.data_ptr() if zero is not None else None, result.data_ptr())
    wide, groups = int(x.dtype == torch.float32), grid.shape[1] if zero is not None else 0
    work = columns * max(tokens, 1)
    _share(rows, work, lambda start, stop: library.tightfit_product(bits, wide, groups, tokens, columns, rows, start, stop, *places))
    return result


def _decode(library: ctypes.CDLL, bits: int, packed: Tensor, grid: Tensor, zero: Tensor | None, columns: int, dtype: torch.dtype) -> Tensor:
    """All rows by the library."""
    rows = packed.shape[0]
    _check(bits, packed, grid, zero, columns)
    dense = torch.empty(rows, columns, dtype=dtype)
    places = (packed.data_ptr(), grid.data_ptr(), zero.data_ptr() if zero is not None else None, dense.data_ptr())
    wide, groups = int(dtype == torch.float32), grid.shape[1] if zero is not None else 0
    _share(rows, columns, lambda start, stop: library.tightfit_decode(bits, wide, groups, columns, start, stop, *places))
    return dense


def _check(bits: int, packed: Tensor, grid: Tensor, zero: Tensor | None, columns: int) -> None:
    """What the library takes for granted: it reads where it is told to."""
    (rows, row_bytes), (grid_rows, groups) = packed.shape, grid.shape
    assert row_bytes == -(-columns // DEPTH) * 2 * bits and grid_rows == rows
    assert packed.is_contiguous() and grid.is_contiguous() and packed.dtype == torch.int8 and grid.dtype == torch.bfloat16
    if zero is None:
        assert groups == 1 << bits
    else:
        assert zero.shape == grid.shape and zero.is_contiguous() and zero.dtype == torch.uint8
        assert groups == 1 or (columns % groups == 0 and columns // groups % GROUP_STEP == 0)


def _table_product(x: Tensor, packed: Tensor, table: Tensor) -> Tensor:
    bits = table.shape[1].bit_length() - 1
    library = _kernel_for(bits, packed, x.dtype)
    if library is not None:
        return _product(library, bits, x, packed, table, None)
    gpu = _gpu_for(bits, packed, x.dtype)
    if gpu is not None:
        return gpu.table_product(x, packed, table)
    columns = x.shape[1]
    decode = lambda start, stop: portable.table_decode(packed[start:stop], table[start:stop], columns, x.dtype)  # noqa: E731
    return portable.product(x, packed.shape[0], columns * x.element_size(), decode)


def _affine_product(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    columns = x.shape[1]
    bits = portable.affine_bits(packed, columns)
    library = _kernel_for(bits, packed, x.dtype)
    if library is not None:
        return _product(library, bits, x, packed, scale, zero)
    gpu = _gpu_for(bits, packed, x.dtype)
    if gpu is not None:
        return gpu.affine_product(x, packed, scale, zero)
    decode = lambda start, stop: portable.affine_decode(packed[start:stop], scale[start:stop], zero[start:stop], columns, x.dtype)  # noqa: E731
    return portable.product(x, packed.shape[0], columns * x.element_size(), decode)


def _table_decode(packed: Tensor, table: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    bits = table.shape[1].bit_length() - 1
    library = _kernel_for(bits, packed, dtype)
    if library is not None:
        return _decode(library, bits, packed, table, None, columns, dtype)
    gpu = _gpu_for(bits, packed, dtype)
    if gpu is not None:
        return gpu.table_decode(packed, table, columns, dtype)
    return portable.table_decode(packed, table, columns, dtype)


def _affine_decode(packed: Tensor, scale: Tensor, zero: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    bits = portable.affine_bits(packed, columns)
    library = _kernel_for(bits, packed, dtype)
    if library is not None:
        return _decode(library, bits, packed, scale, zero, columns, dtype)
    gpu = _gpu_for(bits, packed, dtype)
    if gpu is not None:
        return gpu.affine_decode(packed, scale, zero, columns, dtype)
    return portable.affine_decode(packed, scale, zero, columns, dtype)


def _shape_of_product(x: Tensor, packed: Tensor, *grid: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


def _shape_of_table(packed: Tensor, table: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(packed.shape[0], columns, dtype=dtype)


def _shape_of_affine(packed: Tensor, scale: Tensor, zero: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(packed.shape[0], columns, dtype=dtype)


_OPERATORS = torch.library.Library("tightfit", "FRAGMENT")  # 2 µs a call; `torch.library.custom_op` takes 9
for _schema, _deed, _shape in (
    ("table_product(Tensor x, Tensor packed, Tensor table) -> Tensor", _table_product, _shape_of_product),
    ("affine_product(Tensor x, Tensor packed, Tensor scale, Tensor zero) -> Tensor", _affine_product, _shape_of_product),
    ("table_decode(Tensor packed, Tensor table, int columns, ScalarType dtype) -> Tensor", _table_decode, _shape_of_table),
    ("affine_decode(Tensor packed, Tensor scale, Tensor zero, int columns, ScalarType dtype) -> Tensor", _affine_decode, _shape_of_affine),
):
    _name = _schema.partition("(")[0]
    _OPERATORS.define(_schema)
    for _key in ("CPU", "CUDA"):
        _OPERATORS.impl(_name, _deed, _key)
    torch.library.register_fake(f"tightfit::{_name}", _shape, lib=_OPERATORS)


def table_product(x: Tensor, packed: Tensor, table: Tensor) -> Tensor:
    """`x @ dense.T`, `dense[row, column] = table[row, code]`.  # (tokens, columns) → (tokens, rows) in x's dtype

    `packed` (rows, packed_bytes) int8 and `table` (rows, 2^bits) bfloat16, both contiguous. Sums are in float32.
    """
    return torch.ops.tightfit.table_product.default(x, packed, table)


def affine_product(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`x @ dense.T`, `dense = scale · (code - zero)` rounded to x's dtype.  # (tokens, columns) → (tokens, rows) in x's dtype

    `packed` (rows, packed_bytes) int8, `scale` (rows, groups) bfloat16, `zero` (rows, groups) uint8, all contiguous. A group is a
    multiple of 32 columns, or the row.
    """
    return torch.ops.tightfit.affine_product.default(x, packed, scale, zero)


def table_decode(packed: Tensor, table: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """`table[row, code]` as a fresh dense tensor.  # (rows, packed_bytes) int8, (rows, 2^bits) bfloat16 → (rows, columns)"""
    return torch.ops.tightfit.table_decode.default(packed, table, columns, dtype)


def affine_decode(packed: Tensor, scale: Tensor, zero: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """`scale · (code - zero)`, computed in float32 and rounded, as a fresh dense tensor.  # → (rows, columns)"""
    return torch.ops.tightfit.affine_decode.default(packed, scale, zero, columns, dtype)


def _product_flops(x: Any, packed: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x.numel() * packed.shape[0]


register_flop_formula([torch.ops.tightfit.table_product, torch.ops.tightfit.affine_product], get_raw=True)(_product_flops)
