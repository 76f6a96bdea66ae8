"""Affine: two to eight bits per weight on evenly spaced values, for rows or groups of columns."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tightfit.formats.codec import SLICED, Codec, Part, Shape, check_finite
from tightfit.formats.grids import AffineGrid
from tightfit.formats.kernels import affine_decode, affine_decode_bytes, affine_product, has_product, padded_bytes
from tightfit.formats.packing import pack, packed_bytes
from tightfit.formats.ranges import range_grid
from tightfit.terms.errors import TightfitError

GROUP_STEP = 32
"""A group is a multiple of so many columns: what a kernel reads at once."""


@dataclass(frozen=True)
class AffineCodec(Codec):
    """`weight = scale · (code - zero)`, scale in bfloat16 and zero in 8 bits for each group: `bits + 24 / group` bits per weight.

    `group` columns share them, 0 for a whole row. Computed in float32 and rounded once.
    """

    bits: int = 4
    group: int = 0

    def groups(self, columns: int) -> int:
        """Groups in a row. Raises `TightfitError` where they do not divide it."""
        group = self.group or columns
        if columns % group or (self.group and self.group % GROUP_STEP):
            raise TightfitError(
                f"groups of {group} columns do not divide a row of {columns}"
                if columns % group
                else f"a group of {group} columns is too fine",
                hint=f"multiples of {GROUP_STEP} that divide every layer's width do; 0 is the whole row",
            )
        return columns // group

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        """Codes as `formats/packing.py` lays them; scale and zero (rows, groups)."""
        rows, columns = shape
        many = (rows, self.groups(columns))
        codes = Part("", (rows, packed_bytes(columns, self.bits)), torch.int8)
        return codes, Part("scale", many, torch.bfloat16), Part("zero", many, torch.uint8)

    def encode(self, dense: Tensor) -> tuple[Tensor, ...]:
        """Round to nearest between the least and the greatest weight of each group."""
        check_finite(dense)
        grid = range_grid(dense, self.bits, self.groups(dense.shape[1]), searched=False)
        steps = dense.float().unflatten(1, (-1, grid.group)) / grid.scale[:, :, None] + grid.zero[:, :, None]
        return self.stored(grid, steps.round_().clamp_(0, 2**self.bits - 1).to(torch.uint8).flatten(1))

    def stored(self, grid: AffineGrid, codes: Tensor) -> tuple[Tensor, ...]:
        """The stored tensors of what a solver found.  # codes: (rows, columns) uint8"""
        return pack(codes, self.bits), grid.scale.to(torch.bfloat16), grid.zero.to(torch.uint8)

    def decode(self, tensors: Sequence[Tensor], shape: Shape, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """`scale · (code - zero)`."""
        codes, scale, zero = (tensor[start:stop] for tensor in tensors)
        return affine_decode(codes, scale, zero, shape[1], dtype)

    def decode_bytes(self, shape: Shape, rows: int, dtype: torch.dtype) -> int:
        """Dense rows, and what the way of decoding takes beside them."""
        return rows * shape[1] * dtype.itemsize + affine_decode_bytes(rows, shape[1], self.bits, dtype)

    def kernel(self, device: str, dtype: torch.dtype, tokens: int, shape: Shape) -> str:
        """One product for few tokens where this machine has it."""
        return "affine_product" if has_product(self.bits, device, dtype, tokens) else SLICED

    def kernel_product(self, x: Tensor, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        """Values are made in a register and never rest anywhere."""
        return affine_product(x, *tensors)

    def kernel_bytes(self, device: str, dtype: torch.dtype, tokens: int, shape: Shape) -> int:
        """The input, padded to whole chunks."""
        return padded_bytes(tokens, shape[1], dtype)
