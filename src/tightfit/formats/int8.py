"""Int8: eight bits per weight and one scale per output row, symmetric."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tightfit.formats.codec import SLICED, Codec, Part, Shape, check_finite, is_aligned, row_slices
from tightfit.terms.units import MIB

LARGEST_CODE = 127
"""Symmetric: -128 is not used (BMInf)."""

KERNEL_TOKENS = {"cpu": 16, "cuda": 8}
"""Most tokens for which `_weight_int8pack_mm` beats slices. CPU, bfloat16, 4096 x 4096, one thread: 1.2 ms against 6.2 at one token,
7.7 against 8.3 at 16, 17 against 11 at 32; dense takes 3.0, 4.8 and 7.3. CUDA: not measured; the kernel reads the codes once for every
token, so it stays with few."""

KERNEL_COLUMNS = 16
"""The CPU kernel reads this many columns at a time, and past the end of a row (wrong results, no error) where they do not divide it."""

_VECTOR_BYTES = {"codes": 16, "x": 32}
"""The CPU kernel loads so many bytes at once and crashes where their address is not a multiple."""

_ENCODE_BYTES = 16 * MIB
"""Float32 workspace while a weight is read."""


@dataclass(frozen=True)
class Int8Codec(Codec):
    """`scale[row] = max |dense[row]| / 127`, `codes = round_half_even(dense / scale)`; no zero point (BMInf, ACL 2022, quantization).

    The scale is rounded up to bfloat16 *before* the codes are found. So it is exact in bfloat16 and wider, a kernel that wants scales in
    the dtype of its input loses nothing, and all ways to multiply see the same weights. A row's step grows by less than 1/128.
    float16 reaches down to 6e-8 only, and to 6e-5 with all its digits: for it codes and scales are multiplied in float32.
    """

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        """Codes (rows, columns) int8 and scale (rows,) bfloat16."""
        return (Part("", shape, torch.int8), Part("scale", shape[:1], torch.bfloat16))

    def encode(self, dense: Tensor) -> tuple[Tensor, ...]:
        """Codes and scales; a row of zeros gets the scale 1, so nothing is divided by zero."""
        check_finite(dense)
        absmax = torch.maximum(dense.amax(dim=1), -dense.amin(dim=1)).float()  # (rows,)
        scale = bfloat16_above(torch.where(absmax == 0, torch.ones_like(absmax), absmax / LARGEST_CODE))
        codes = torch.empty(dense.shape, dtype=torch.int8, device=dense.device)
        for start, stop in row_slices(dense.shape[0], 4 * dense.shape[1], 1, _ENCODE_BYTES):
            steps = dense[start:stop].to(torch.float32, copy=True).div_(scale[start:stop, None].float())
            codes[start:stop] = steps.round_()  # half to even
        return codes, scale

    def decode(self, tensors: Sequence[Tensor], shape: Shape, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """`codes * scale`."""
        codes, scale = tensors
        work = _working(dtype)
        return codes[start:stop].to(work).mul_(scale[start:stop, None].to(work)).to(dtype)

    def decode_bytes(self, shape: Shape, rows: int, dtype: torch.dtype) -> int:
        """The rows, and their scales in `dtype`; for float16 the rows in float32 too."""
        work = _working(dtype)
        whole = rows * (shape[1] + 1) * work.itemsize
        return whole if work == dtype else max(whole, rows * shape[1] * (work.itemsize + dtype.itemsize))

    def kernel(self, device: str, dtype: torch.dtype, tokens: int, shape: Shape) -> str:
        """On a CPU only bfloat16 has a vectorized kernel: that of float32 and float16 is slower than slices at any length."""
        has_kernel = device == "cuda" or (device == "cpu" and dtype == torch.bfloat16 and shape[1] % KERNEL_COLUMNS == 0)
        return "_weight_int8pack_mm" if has_kernel and 0 < tokens <= KERNEL_TOKENS[device] else SLICED

    def kernel_product(self, x: Tensor, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        """torch's weight-only int8 product, where the addresses allow it: weights mapped from a file may lie anywhere."""
        codes, scale = tensors
        if not is_aligned(codes, _VECTOR_BYTES["codes"]):
            return self.sliced_product(x, tensors, shape)
        rows = x.to(_working(x.dtype)).contiguous()
        rows = rows if is_aligned(rows, _VECTOR_BYTES["x"]) else rows.clone()
        return torch._weight_int8pack_mm(rows, codes, scale.to(rows.dtype)).to(x.dtype)

    def kernel_bytes(self, device: str, dtype: torch.dtype, tokens: int, shape: Shape) -> int:
        """CUDA computes in float32: copies of input, scales and result, its own or, for float16, ours."""
        scales = shape[0] * dtype.itemsize if dtype == torch.float32 else 0
        return scales + (int8pack_bytes(tokens, shape, dtype) if device == "cuda" else 0)


def int8pack_bytes(tokens: int, shape: Shape, dtype: torch.dtype) -> int:
    """Bytes that CUDA's `_weight_int8pack_mm` allocates beside its result, when that is not in float32 already."""
    return 0 if dtype == torch.float32 else 4 * (tokens * (shape[0] + shape[1]) + shape[0])


def _working(dtype: torch.dtype) -> torch.dtype:
    """Where codes and scales are multiplied for a result in `dtype`."""
    return torch.float32 if dtype == torch.float16 else dtype


def bfloat16_above(values: Tensor) -> Tensor:
    """The least bfloat16 that is not below each positive float32 value."""
    return ((values.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
