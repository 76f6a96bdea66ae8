"""Table: two to eight bits per weight on values of each row's own choice."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tightfit.formats.codec import SLICED, Codec, Part, Shape, check_finite
from tightfit.formats.grids import TableGrid, fit_table
from tightfit.formats.kernels import has_product, padded_bytes, table_decode, table_decode_bytes, table_product
from tightfit.formats.packing import pack, packed_bytes

_ENCODE_ROWS = 1 << 18
"""Weights whose codes are looked up at a time."""


@dataclass(frozen=True)
class TableCodec(Codec):
    """`weight[r, c] = table[r, code[r, c]]`, tables in bfloat16: `bits + 2^bits · 16 / columns` bits per weight (LeanQuant, section 4)."""

    bits: int = 4

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        """Codes as `formats/packing.py` lays them, and the tables (rows, 2^bits)."""
        rows, columns = shape
        return Part("", (rows, packed_bytes(columns, self.bits)), torch.int8), Part("table", (rows, 2**self.bits), torch.bfloat16)

    def encode(self, dense: Tensor) -> tuple[Tensor, ...]:
        """The best table for each row by itself, and the nearest codes: what can be done without knowing the layer's inputs."""
        check_finite(dense)
        grid = TableGrid(fit_table(dense, self.bits))
        return self.stored(grid, nearest(dense, grid))

    def stored(self, grid: TableGrid, codes: Tensor) -> tuple[Tensor, ...]:
        """The stored tensors of what a solver found.  # codes: (rows, columns) uint8"""
        return pack(codes, self.bits), grid.table.to(torch.bfloat16)

    def decode(self, tensors: Sequence[Tensor], shape: Shape, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Look each code up."""
        return table_decode(tensors[0][start:stop], tensors[1][start:stop], shape[1], dtype)

    def decode_bytes(self, shape: Shape, rows: int, dtype: torch.dtype) -> int:
        """Dense rows, and what the way of decoding takes beside them."""
        return rows * shape[1] * dtype.itemsize + table_decode_bytes(rows, shape[1], self.bits, dtype)

    def kernel(self, device: str, dtype: torch.dtype, tokens: int, shape: Shape) -> str:
        """One product for few tokens where this machine has it."""
        return "table_product" if has_product(self.bits, device, dtype, tokens) else SLICED

    def kernel_product(self, x: Tensor, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        """Values are looked up in a register and never rest anywhere."""
        return table_product(x, *tensors)

    def kernel_bytes(self, device: str, dtype: torch.dtype, tokens: int, shape: Shape) -> int:
        """The input, padded to whole chunks."""
        return padded_bytes(tokens, shape[1], dtype)


def nearest(dense: Tensor, grid: TableGrid) -> Tensor:
    """The nearest code of every weight.  # (rows, columns) → the same, uint8"""
    step = max(1, _ENCODE_ROWS // dense.shape[1])
    found = (
        torch.searchsorted(middle.contiguous(), part.float()).to(torch.uint8)
        for part, middle in zip(dense.split(step), grid.middles.split(step), strict=True)
    )
    return torch.cat(list(found))
