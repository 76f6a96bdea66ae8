"""Codec: how a matrix rests in few bits. The contract, the registered tensors that hold it, and products slice by slice.

A product never makes the whole dense matrix: rows are decoded a slice at a time. That bounds the workspace, and on a CPU it is
faster than decoding everything first, because a slice stays in the cache until it is multiplied.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.terms.errors import TightfitError
from tightfit.terms.units import MIB

SLICE_BYTES = {"cpu": 4 * MIB, "cuda": 16 * MIB}
"""Decoded bytes at a time. CPU: a few times the second-level cache; 2 to 8 MiB are equally fast, 16 MiB up to four times slower at
one token (fresh pages). CUDA: not measured; large enough that a slice's product outlasts the launch of its kernels."""

SLICED = "sliced"
"""The product that every codec has: decode some rows, multiply, next rows."""

_rehearsed_device: str | None = None


@contextmanager
def as_if_on(device: str) -> Iterator[None]:
    """Take the products that `device` (`cpu`, `cuda`) would take, whatever device the tensors have: for fake tensors only."""
    global _rehearsed_device
    before, _rehearsed_device = _rehearsed_device, device
    try:
        yield
    finally:
        _rehearsed_device = before


def device_of(tensor: Tensor) -> str:
    """The device type whose products are taken for `tensor`."""
    return _rehearsed_device or tensor.device.type


@dataclass(frozen=True)
class Part:
    """One stored tensor of a matrix. Its name is the parameter's, and `_suffix` after it unless the suffix is empty."""

    suffix: str
    shape: tuple[int, ...]
    dtype: torch.dtype


Shape = tuple[int, int]
"""Rows (output features) and columns (input features)."""


class Codec(ABC):
    """Encodes and decodes matrices, and multiplies with encoded ones. Final codecs are frozen dataclasses without state.

    `tensors` are always the stored tensors in the order of `parts`, `shape` is the dense matrix's.
    """

    library: ClassVar[str] = ""
    """The foreign library whose code comes into the process with this codec, beside the tensors; none by itself."""

    @abstractmethod
    def parts(self, shape: Shape) -> tuple[Part, ...]:
        """The stored tensors of a matrix; the first has an empty suffix and holds the codes, in `torch.int8`.

        (transformers casts activations to `weight.dtype` in T5 and its kin, unless that is `int8`.)
        """

    @abstractmethod
    def encode(self, dense: Tensor) -> tuple[Tensor, ...]:
        """Stored tensors of `dense` (rows, columns). Raises `TightfitError` when it holds NaN or infinite values."""

    @abstractmethod
    def decode(self, tensors: Sequence[Tensor], shape: Shape, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows `start:stop` as a fresh dense tensor of `dtype`; `start` is a multiple of `row_step`, `stop` too or the last row."""

    def row_step(self, shape: Shape) -> int:
        """Rows that can only be decoded together: each by itself, unless a codec says otherwise."""
        return 1

    @abstractmethod
    def decode_bytes(self, shape: Shape, rows: int, dtype: torch.dtype) -> int:
        """Bytes that `decode` holds at its highest moment for that many rows, the result included."""

    @abstractmethod
    def kernel(self, device: str, dtype: torch.dtype, tokens: int, shape: Shape) -> str:
        """The name of the kernel that multiplies `tokens` rows of `dtype` on `device`, or `sliced`."""

    @abstractmethod
    def kernel_product(self, x: Tensor, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        """`x @ dense.T` through the kernel that `kernel` named.  # (tokens, columns) → (tokens, rows)"""

    @abstractmethod
    def kernel_bytes(self, device: str, dtype: torch.dtype, tokens: int, shape: Shape) -> int:
        """Bytes that `kernel_product` allocates beside its result."""

    def path(self, device: str, dtype: torch.dtype, shape: Shape) -> tuple[str, str]:
        """The kernels for one token and for very many."""
        return self.kernel(device, dtype, 1, shape), self.kernel(device, dtype, 1 << 30, shape)

    def product(self, x: Tensor, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        """`x @ dense.T`, by the fastest way there is.  # (tokens, columns) → (tokens, rows)"""
        if self.kernel(device_of(x), x.dtype, x.shape[0], shape) != SLICED:
            return self.kernel_product(x, tensors, shape)
        return self.sliced_product(x, tensors, shape)

    def sliced_product(self, x: Tensor, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        """`x @ dense.T`, slice by slice.  # (tokens, columns) → (tokens, rows)"""
        slices = self.slices(shape, x.dtype, device_of(x))
        if len(slices) == 1:
            return torch.mm(x, self.decode(tensors, shape, 0, shape[0], x.dtype).t())
        if isinstance(x, FakeTensor):
            return rehearsed_product(x, list(tensors), *shape, self.transposed_bytes(device_of(x), x.dtype, shape), transposed=False)
        result = x.new_empty(x.shape[0], shape[0])
        for start, stop in slices:
            torch.mm(x, self.decode(tensors, shape, start, stop, x.dtype).t(), out=result[:, start:stop])
        return result

    def product_transposed(self, x: Tensor, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        """`x @ dense`, slice by slice: the gradient of `product` for its input.  # (tokens, rows) → (tokens, columns)"""
        slices = self.slices(shape, x.dtype, device_of(x))
        if len(slices) > 1 and isinstance(x, FakeTensor):
            return rehearsed_product(x, list(tensors), *shape, self.transposed_bytes(device_of(x), x.dtype, shape), transposed=True)
        result: Tensor | None = None
        for start, stop in slices:
            left, right = x[:, start:stop], self.decode(tensors, shape, start, stop, x.dtype)
            result = torch.mm(left, right) if result is None else torch.addmm(result, left, right, out=result)
            del right  # else two slices would be alive while the next one is decoded
        assert result is not None
        return result

    def slices(self, shape: Shape, dtype: torch.dtype, device: str) -> list[tuple[int, int]]:
        """Ranges of rows, each of which decodes into at most `SLICE_BYTES` (or one `row_step`, where that is more)."""
        row_bytes = shape[1] * dtype.itemsize
        return row_slices(shape[0], row_bytes, self.row_step(shape), SLICE_BYTES.get(device, SLICE_BYTES["cuda"]))

    def product_bytes(self, device: str, dtype: torch.dtype, tokens: int, shape: Shape) -> int:
        """Bytes that `product` allocates beside its result."""
        if self.kernel(device, dtype, tokens, shape) != SLICED:
            return self.kernel_bytes(device, dtype, tokens, shape)
        return self.transposed_bytes(device, dtype, shape)

    def transposed_bytes(self, device: str, dtype: torch.dtype, shape: Shape) -> int:
        """Bytes that `product_transposed` allocates beside its result."""
        start, stop = self.slices(shape, dtype, device)[0]
        return self.decode_bytes(shape, stop - start, dtype)


@torch.library.custom_op("tightfit::rehearsed_product", mutates_args=())
def rehearsed_product(x: Tensor, stored: list[Tensor], rows: int, columns: int, slice_bytes: int, transposed: bool) -> Tensor:
    """Stands for a sliced product while it is rehearsed: walking through hundreds of equal slices would only take time.

    `slice_bytes` is what one decoded slice holds, which `formats/workspace.py` adds to the peak.
    """
    raise RuntimeError("a rehearsed product has no values; it takes fake tensors only")


@rehearsed_product.register_fake
def _(x: Tensor, stored: list[Tensor], rows: int, columns: int, slice_bytes: int, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], columns if transposed else rows)


def row_slices(rows: int, row_bytes: int, step: int, limit_bytes: int) -> list[tuple[int, int]]:
    """`rows` in ranges of at most `limit_bytes`, each a multiple of `step` rows but the last."""
    size = max(limit_bytes // max(row_bytes, 1) // step * step, step)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def check_finite(dense: Tensor) -> None:
    """Raise `TightfitError` when `dense` holds NaN or infinite values. The caller knows the tensor's name."""
    low, high = dense.aminmax()
    if torch.isnan(low) or torch.isnan(high):
        raise TightfitError("weight holds NaN", hint="the checkpoint may be damaged; fetch it again")
    if torch.isinf(low) or torch.isinf(high):
        raise TightfitError("weight holds infinite values", hint="the checkpoint may be damaged; fetch it again")


def is_aligned(tensor: Tensor, alignment_bytes: int) -> bool:
    """Whether `tensor` begins at a multiple of `alignment_bytes`. Fake tensors lie nowhere, and count as if torch had placed them."""
    return isinstance(tensor, FakeTensor) or tensor.data_ptr() % alignment_bytes == 0


def register_parts(module: nn.Module, name: str, parts: Sequence[Part], lead: tuple[int, ...] = ()) -> None:
    """Give `module` the stored tensors of `name` on `meta`: codes as a frozen parameter, what belongs to them as buffers.

    `lead` is put before every shape, for matrices that are stacked.
    """
    for part in parts:
        tensor = torch.empty(lead + part.shape, dtype=part.dtype, device="meta")
        if part.suffix:
            module.register_buffer(f"{name}_{part.suffix}", tensor)
        else:
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def part_names(name: str, parts: Sequence[Part]) -> list[str]:
    """The names of the stored tensors of `name`."""
    return [f"{name}_{part.suffix}" if part.suffix else name for part in parts]


def materialize(module: nn.Module, name: str, device: torch.device) -> Tensor:
    """The parameter or buffer `name` of `module`, made empty on `device` if it was on `meta`."""
    owner = module._parameters if name in module._parameters else module._buffers
    old = owner[name]
    assert old is not None
    if old.is_meta:
        empty = torch.empty(old.shape, dtype=old.dtype, device=device)
        owner[name] = nn.Parameter(empty, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else empty
    filled = owner[name]
    assert filled is not None
    return filled.detach()


def check_shape(name: str, dense: Tensor, expected: Sequence[int]) -> None:
    """Raise `TightfitError` when a tensor of the checkpoint has another shape than the model wants."""
    if tuple(dense.shape) != tuple(expected):
        raise TightfitError(
            f"{name} has the shape {list(dense.shape)}, the model wants {list(expected)}",
            hint="the config and the weights belong to different models",
        )


def keeping_bits(change: Callable[[Tensor], Tensor], stored: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """`change` for `nn.Module._apply`, such that `.half()` or `.to(dtype)` moves the `stored` tensors but never rounds them."""
    known = {id(tensor) for tensor in stored}

    def careful(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            return change(tensor)
        return change(tensor.detach().view(torch.uint8)).view(tensor.dtype)

    return careful
