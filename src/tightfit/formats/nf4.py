"""NF4: four bits per weight on the quantiles of a normal distribution, a scale for every 64."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.flop_counter import register_flop_formula

from tightfit.formats.codec import SLICED, Codec, Part, Shape, check_finite, row_slices
from tightfit.terms.units import MIB

logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
"""bitsandbytes warns that a kernel from the hub is missing; its own does the same work."""

with torch.device("cpu"), unset_fake_temporarily():  # it makes tables while it is imported, and keeps them
    import bitsandbytes.functional as bitsandbytes

Layout = Literal["standard", "packed"]

BLOCK = 64
"""Weights that share a scale (QLoRA, section 3)."""

NESTED_BLOCK = 256
"""Scales that share a scale, with double quantization (QLoRA, section 3)."""

PACKED_ROWS = 32
"""Rows that the fused CPU kernel interleaves."""

PACKED_TOKENS = 128
"""Most tokens for which the fused CPU kernel beats slices of unpacked rows. bfloat16, 4096 x 4096, one thread: 0.6 ms against 11 at
one token, 30 against 33 at 128, 62 against 54 at 256; dense takes 3.0, 22 and 40."""

FUSED_TOKENS = 4
"""Most tokens for which bitsandbytes' `gemm_4bit` surely runs its fused CUDA kernel; beyond it may decode the whole weight inside."""

_ENCODE_BYTES = 16 * MIB
"""Float32 weights that are encoded at a time."""

_ENCODE_BLOCKS = 2048
"""Blocks that are compared with the midpoints at a time: half a MiB of float32, which stays in the second-level cache."""


@dataclass(frozen=True)
class NF4Codec(Codec):
    """NF4 as bitsandbytes stores it (`standard`), or in the order that its fused CPU kernel reads (`packed`).

    standard: 4 + 32/64 bits per weight; with double quantization 4 + 8/64 + 32/(64·256) = 4.127 (QLoRA, section 3).
    packed: 4 + 16/64 bits, scales in bfloat16. Only where 32 divides the rows and 64 the columns; other shapes are kept standard.
    """

    library: ClassVar[str] = "bitsandbytes"

    layout: Layout = "standard"
    double_quantization: bool = True

    def is_packed(self, shape: Shape) -> bool:
        """Whether a matrix of this shape is stored packed."""
        return self.layout == "packed" and shape[0] % PACKED_ROWS == 0 and shape[1] % BLOCK == 0

    def parts(self, shape: Shape) -> tuple[Part, ...]:
        """Two codes a byte; then scales, by layout."""
        rows, columns = shape
        blocks = -(-rows * columns // BLOCK)
        codes = Part("", (rows, columns // 2) if columns % 2 == 0 else ((rows * columns + 1) // 2,), torch.int8)
        if self.is_packed(shape):
            return codes, Part("absmax", (columns // BLOCK, rows), torch.bfloat16)
        if not self.double_quantization:
            return codes, Part("absmax", (blocks,), torch.float32)
        return (
            codes,
            Part("absmax", (blocks,), torch.uint8),
            Part("nested_absmax", (-(-blocks // NESTED_BLOCK),), torch.float32),
            Part("nested_code", (256,), torch.float32),
            Part("offset", (1,), torch.float32),
        )

    def encode(self, dense: Tensor) -> tuple[Tensor, ...]:
        """Codes and scales, equal to those of bitsandbytes' `quantize_4bit`."""
        check_finite(dense)
        shape = (dense.shape[0], dense.shape[1])
        codes, absmax = _encode_standard(dense)
        if self.is_packed(shape):
            return _pack(codes, shape), absmax.view(shape[0], -1).t().to(torch.bfloat16).contiguous()
        codes = codes.view(self.parts(shape)[0].shape).view(torch.int8)
        if not self.double_quantization:
            return codes, absmax
        offset = absmax.mean()
        nested_code = torch.tensor(_dynamic_code(), device=dense.device)
        nested, nested_absmax = torch.ops.bitsandbytes.quantize_blockwise(absmax - offset, nested_code, NESTED_BLOCK)
        return codes, nested, nested_absmax, nested_code, offset.view(1)

    def decode(self, tensors: Sequence[Tensor], shape: Shape, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """`quantile[code] * absmax`, by bitsandbytes' kernel."""
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return self.decode(tensors, shape, start, stop, torch.float32).to(dtype)
        first, last = start * shape[1], stop * shape[1]
        if self.is_packed(shape):
            codes = _unpack(tensors[0][start:stop], shape[1])
            absmax = tensors[1][:, start:stop].t().to(torch.float32).flatten()
        else:
            codes = tensors[0].view(-1).view(torch.uint8)[first // 2 : (last + 1) // 2]
            absmax = self._absmax(tensors, first // BLOCK, -(-last // BLOCK))
        # One long row of even length: bitsandbytes' CPU kernel starts a block anew in every row, and compiles for odd lengths.
        even = last - first + (last - first) % 2
        dense = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, BLOCK, "nf4", (1, even), dtype)
        return dense.view(-1)[: last - first].view(stop - start, shape[1])

    def _absmax(self, tensors: Sequence[Tensor], first: int, last: int) -> Tensor:
        """Scales of the blocks `first:last` in float32."""
        if not self.double_quantization:
            return tensors[1][first:last]
        _, nested, nested_absmax, nested_code, offset = tensors
        scales = nested_absmax[first // NESTED_BLOCK : -(-last // NESTED_BLOCK)]
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(nested[first:last], scales, nested_code, NESTED_BLOCK, torch.float32)
        return absmax.add_(offset)

    def row_step(self, shape: Shape) -> int:
        """Rows that end together with a block of scales (of 16 384 weights with double quantization)."""
        if self.is_packed(shape):
            return PACKED_ROWS
        block = BLOCK * NESTED_BLOCK if self.double_quantization else BLOCK
        return min(block // math.gcd(block, shape[1]), shape[0])

    def decode_bytes(self, shape: Shape, rows: int, dtype: torch.dtype) -> int:
        """Dense rows, their scales in float32, and when packed the codes in standard order."""
        weights = rows * shape[1]
        dense = weights * dtype.itemsize + (4 * weights if dtype.itemsize > 4 else 0)
        if self.is_packed(shape):
            return dense + weights // 2 + weights // 16
        return dense + (-(-weights // BLOCK) * 4 if self.double_quantization else 0)

    def kernel(self, device: str, dtype: torch.dtype, tokens: int, shape: Shape) -> str:
        """Packed: `gemv_4bit` on a CPU that has it. Standard: `gemm_4bit` on CUDA. Each for few tokens only."""
        if self.is_packed(shape):
            return "gemv_4bit" if device == "cpu" and 0 < tokens <= PACKED_TOKENS and has_packed_kernel() else SLICED
        fused = device == "cuda" and torch.version.hip is None and shape[1] % BLOCK == 0 and 0 < tokens <= FUSED_TOKENS
        return "gemm_4bit" if fused and dtype.itemsize <= 4 else SLICED

    def kernel_product(self, x: Tensor, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        """A fused kernel. The one for packed weights computes in bfloat16, whatever the dtype of `x`."""
        codes = tensors[0].view(torch.uint8)
        if self.is_packed(shape):
            half = x.to(torch.bfloat16).contiguous()
            which = x.new_zeros(2, dtype=torch.float32)  # the kernel reads from the table's second entry only: NF4 or FP4?
            return torch.ops.bitsandbytes.gemv_4bit(half, codes, shape, tensors[1], which, BLOCK).to(x.dtype)
        if not self.double_quantization:
            return torch.ops.bitsandbytes.gemm_4bit(x, codes, shape, tensors[1], BLOCK, "nf4")
        _, nested, nested_absmax, nested_code, offset = tensors
        nesting = {"absmax_8bit": nested, "absmax_code": nested_code, "absmax_offset": offset.view(())}
        return torch.ops.bitsandbytes.gemm_4bit(x, codes, shape, nested_absmax, BLOCK, "nf4", **nesting)

    def kernel_bytes(self, device: str, dtype: torch.dtype, tokens: int, shape: Shape) -> int:
        """Packed: input and result in bfloat16 where `x` is not."""
        return 0 if dtype == torch.bfloat16 or not self.is_packed(shape) else 2 * tokens * (shape[0] + shape[1])


@cache
def has_packed_kernel() -> bool:
    """Whether this CPU (AVX512-BF16) and this build of bitsandbytes have the fused kernel for packed weights."""
    return bool(bitsandbytes.has_avx512bf16())


@cache
def _dynamic_code() -> tuple[float, ...]:
    """The 256 values of an 8-bit scale: bitsandbytes' dynamic map."""
    with torch.device("cpu"):
        return tuple(bitsandbytes.create_dynamic_map().tolist())


def _encode_standard(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, two a byte in row order, and absmax of each block in float32."""
    step = BLOCK // math.gcd(BLOCK, dense.shape[1])
    codes, absmax = [], []
    for start, stop in row_slices(dense.shape[0], 4 * dense.shape[1], step, _ENCODE_BYTES):
        rows = dense[start:stop].contiguous()
        rows = rows if rows.dtype.itemsize <= 4 else rows.float()
        if rows.device.type == "cpu" and rows.numel() % (2 * BLOCK) == 0:
            slice_codes, slice_absmax = _quantize_on_cpu(rows.view(-1, BLOCK))
        else:
            slice_codes, slice_absmax = torch.ops.bitsandbytes.quantize_4bit(rows, BLOCK, "nf4", torch.uint8)
        codes.append(slice_codes.flatten())
        absmax.append(slice_absmax)
    return torch.cat(codes), torch.cat(absmax)


def _quantize_on_cpu(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bitsandbytes' `quantize_4bit`, bit for bit and faster.  # (blocks, 64) → (weights / 2,), (blocks,)

    A code is the number of midpoints below the weight. Counting them costs fifteen vectorized comparisons of what lies in the
    cache; a search for the place, as `torch.bucketize` does it, costs branches.
    """
    table = bitsandbytes.get_4bit_type("nf4", device="cpu")
    midpoints = ((table[:-1] + table[1:]) / 2).tolist()
    codes = torch.empty(blocks.numel() // 2, dtype=torch.uint8)
    absmax = torch.empty(blocks.shape[0])
    for start in range(0, blocks.shape[0], _ENCODE_BLOCKS):
        part = blocks[start : start + _ENCODE_BLOCKS].float()
        scale = absmax[start : start + _ENCODE_BLOCKS].copy_(part.abs().amax(dim=1))
        scaled = (part * (1.0 / scale.clamp(min=1e-38)).unsqueeze(1)).flatten()
        count = torch.zeros(scaled.numel(), dtype=torch.uint8)
        above = torch.empty(scaled.numel(), dtype=torch.bool)
        for midpoint in midpoints:
            count += torch.gt(scaled, midpoint, out=above).view(torch.uint8)
        torch.bitwise_or(count[::2] << 4, count[1::2], out=codes[start * BLOCK // 2 :][: count.numel() // 2])
    return codes, absmax


def _pack(codes: Tensor, shape: Shape) -> Tensor:
    """Standard order to that of the fused kernel.

    Per 32 rows and pair of columns it wants 32 bytes: byte `2 i + parity` holds row `i` low and row `16 + i` high.
    """
    pairs = codes.view(-1, 2, PACKED_ROWS // 2, shape[1] // 2)  # (groups, low or high, 16, columns / 2), byte = even << 4 | odd
    low, high = pairs[:, 0], pairs[:, 1]
    even = (low >> 4) | (high & 0xF0)
    odd = (low & 0x0F) | (high << 4)
    packed = torch.stack((even, odd), dim=-1)  # (groups, 16, columns / 2, 2)
    return packed.transpose(1, 2).reshape(shape[0], shape[1] // 2).view(torch.int8)


def _unpack(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `_pack`, for any multiple of 32 rows.  # (rows, columns / 2) int8 → flat uint8"""
    half, rows = columns // 2, PACKED_ROWS // 2
    pairs = packed.view(torch.int16).view(-1, half, rows).transpose(1, 2).contiguous()  # (groups, 16, columns / 2), odd << 8 | even
    codes = torch.empty(pairs.shape[0], 2, rows, half, dtype=torch.uint8, device=packed.device)
    codes[:, 0] = (pairs & 0x0F).bitwise_left_shift_(4).bitwise_or_((pairs >> 8).bitwise_and_(0x0F))
    codes[:, 1] = (pairs & 0xF0).bitwise_or_((pairs >> 12).bitwise_and_(0x0F))
    return codes.view(-1)


def _four_bit_flops(x: Tensor, codes: Tensor, shape: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * x.numel() * shape[0]


register_flop_formula([torch.ops.bitsandbytes.gemv_4bit, torch.ops.bitsandbytes.gemm_4bit], get_raw=True)(_four_bit_flops)
