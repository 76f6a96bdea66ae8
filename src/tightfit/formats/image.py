"""A block's image: its tensors as one row of bytes, in a slot of memory or straight in the model's own files.

An image holds frozen tensors only: trainable parameters (`requires_grad`) change, so they stay with their module and never go
into one. A buffer that a forward pass changes (running statistics of a norm in training) is read back unchanged.
"""

import errno
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.terms.errors import TightfitError

PAGE_BYTES = 4096
"""Direct reads want file offsets, lengths and addresses in whole pages; no disk in use has larger sectors."""

TENSOR_BYTES = 64
"""Where torch's CPU allocator puts tensors. Some kernels round differently at other addresses: MKL's float32 matrix-vector product does."""

GAP_BYTES = 64 * 1024
"""Ranges of one file that lie nearer than this are read as one: a further request costs more than the bytes between."""

PIECE_BYTES = 8 * 1024**2
"""What one request reads: of 1, 4, 8 and 16 MiB the least that keeps up with `dd iflag=direct bs=8M` either way; larger ones stop later."""

READERS = 2
"""Reading threads. One alone lets the disk rest while it copies or waits for Python's lock (0.8 of `dd`); a third brought nothing sure."""


@dataclass(frozen=True)
class TensorView:
    """Where a tensor lies inside a slot. `name` is its path inside the block, `offset` counts bytes; tied tensors share an offset."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Segment:
    """Bytes to read. All three numbers are multiples of `PAGE_BYTES`, so the last segment may reach past the end of its file."""

    file: str
    file_offset: int
    length: int
    slot_offset: int


@dataclass(frozen=True)
class BlockImage:
    """A block's tensors inside a slot of `slot_bytes`, and the segments of files that fill it (none while it lies in no file)."""

    tensors: tuple[TensorView, ...]
    segments: tuple[Segment, ...]
    slot_bytes: int

    @property
    def is_aligned(self) -> bool:
        """Whether every tensor lies where torch's own allocator could have put it."""
        return all(view.offset % TENSOR_BYTES == 0 for view in self.tensors)


@dataclass(frozen=True)
class TensorRecord:
    """Where a tensor lies in a file: `offset` counts bytes from the file's first byte."""

    file: str
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def image_of(block: nn.Module) -> BlockImage:
    """A packed layout of all frozen parameters and all buffers of `block`, in no file yet. Works on `meta` and fake modules.

    Tensors that share their bytes exactly (tied ones) come under each name but are laid down once.
    Raises `TightfitError` when everything in the block is trainable.
    """
    rows = [(name, _sharing(tensor), tensor.dtype, tuple(tensor.shape)) for name, tensor in _frozen(block)]
    if not rows:
        raise TightfitError(
            f"a block of type `{type(block).__name__}` has no frozen tensor, so it cannot take turns with others",
            hint="freeze its weights first (`requires_grad_(False)`), or keep the block resident",
        )
    return _pack(rows, TENSOR_BYTES)


def packed(image: BlockImage) -> BlockImage:
    """The tensors of `image` laid side by side, each at a multiple of `TENSOR_BYTES`, in no file."""
    return _pack([(view.name, (view.offset, view.nbytes), view.dtype, view.shape) for view in image.tensors], TENSOR_BYTES)


def image_in_files(records: Mapping[str, TensorRecord]) -> BlockImage | None:
    """The image of a block whose tensors (by path inside the block) lie in files just as torch wants them.

    Near ranges of one file become one segment, wrong neighbours between them included. `None` when a tensor lies at an
    address that its dtype cannot have. Raises `TightfitError` when a record's bytes do not match its shape.
    """
    for name, record in records.items():
        _check(name, record)
    if any(record.offset % record.dtype.itemsize for record in records.values()):
        return None
    segments = _segments(record for record in records.values() if record.nbytes)
    views = [TensorView(name, record.dtype, tuple(record.shape), _place(record, segments)) for name, record in records.items()]
    return BlockImage(tuple(views), tuple(segments), sum(segment.length for segment in segments))


def staging_bytes(image: BlockImage) -> int:
    """What the readers hold beside the slots for blocks like `image`: a buffer each, where tensors must be moved into line."""
    if image.is_aligned or not image.segments:
        return 0
    return READERS * min(PIECE_BYTES, max(segment.length for segment in image.segments))


def bind(block: nn.Module, image: BlockImage, flat: Tensor) -> None:
    """Point each tensor of `image` in `block` at its bytes of `flat`.  # flat: (>= slot_bytes,) uint8, real or fake

    A parameter keeps its identity unless it was on `meta`; then a frozen one takes its place, tied names included.
    """
    with torch.inference_mode(False):  # else tensors bound while generating could never be tuned
        _point(block, _held(block, image), {view.name: _part(flat, view).view(view.dtype).view(view.shape) for view in image.tensors})


def unbind(block: nn.Module, image: BlockImage, device: torch.device | str | None = None) -> None:
    """Point each tensor of `image` in `block` at an empty tensor of its dtype, so that it holds no memory.

    Autograd is told: a backward pass that would read the weights given up raises instead of reading the next block's.
    """
    held = _held(block, image)
    with torch.inference_mode(False):
        _point(block, held, {name: torch.empty(0, dtype=tensor.dtype, device=device or tensor.device) for name, tensor in held.items()})
        torch.autograd.graph.increment_version([tensor for tensor in held.values() if not tensor.is_inference()])


def copy_into(block: nn.Module, image: BlockImage, flat: Tensor) -> None:
    """Copy the tensors of `block` to their places in `flat`: how a block comes to rest in RAM.  # flat: (>= slot_bytes,) uint8"""
    held = _held(block, image)
    for view in image.tensors:
        _part(flat, view).copy_(_bytes(held[view.name]))


def write_image(block: nn.Module, image: BlockImage, file: BinaryIO, offset: int) -> BlockImage:
    """Write the tensors of `block` into `file` (opened for writing by its path) at `offset`, a multiple of `PAGE_BYTES`.

    Returns the image with the segment that reads it back; the next free offset is `offset + segments[0].length`.
    Raises `TightfitError` when the disk is full or cannot be written.
    """
    if offset % PAGE_BYTES:
        raise ValueError(f"offset {offset} is not a multiple of {PAGE_BYTES}")
    held, length = _held(block, image), _up(image.slot_bytes, PAGE_BYTES)
    try:
        for view in {(view.offset, view.nbytes): view for view in image.tensors}.values():
            _write(file.fileno(), memoryview(_bytes(held[view.name]).cpu().numpy()), offset + view.offset)
        if os.fstat(file.fileno()).st_size < offset + length:
            os.ftruncate(file.fileno(), offset + length)
        os.fsync(file.fileno())  # a full disk shows here at the latest, and only clean pages can be given up
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)
    except OSError as fault:
        raise file_fault("written", str(file.name), fault) from fault
    return replace(image, segments=(Segment(os.path.abspath(file.name), offset, length, 0),), slot_bytes=length)


def file_fault(deed: str, file: str, fault: OSError) -> TightfitError:
    """The line for a person when `file` cannot be `deed` (`read`, `written`)."""
    hints = {
        errno.ENOSPC: "free some space, or point `TIGHTFIT_SPILL` at a larger disk",
        errno.EDQUOT: "your quota is used up: free some space, or point `TIGHTFIT_SPILL` at another disk",
        errno.EACCES: "check the permissions of the file and its folder",
        errno.ENOENT: "the file was moved or deleted: download or convert the model again",
        errno.EIO: "the disk reports a fault: check it, or copy the file to another one",
    }
    reason = os.strerror(fault.errno).lower() if fault.errno else str(fault)
    return TightfitError(f"`{file}` cannot be {deed}: {reason}", hint=hints.get(fault.errno or 0, ""))


def _named(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, persistent or not, a tied one under each of its names."""
    yield from block.named_parameters(remove_duplicate=False)
    yield from block.named_buffers(remove_duplicate=False)


def _frozen(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in _named(block) if not tensor.requires_grad)


def _sharing(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are the same bytes, also on `meta`, where addresses are all zero."""
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())


def _pack(rows: Iterable[tuple[str, tuple[object, ...], torch.dtype, tuple[int, ...]]], alignment: int) -> BlockImage:
    """Rows are (name, what marks its bytes, dtype, shape)."""
    places: dict[tuple[object, ...], int] = {}
    views, end = [], 0
    for name, mark, dtype, shape in rows:
        place = places.setdefault(mark, _up(end, alignment))
        views.append(TensorView(name, dtype, shape, place))
        end = max(end, place + views[-1].nbytes)
    return BlockImage(tuple(views), (), _up(end, PAGE_BYTES))


def _check(name: str, record: TensorRecord) -> None:
    expected = torch.Size(record.shape).numel() * record.dtype.itemsize
    if record.nbytes != expected:
        raise TightfitError(
            f"`{name}` in `{record.file}` takes {record.nbytes} bytes; its shape {tuple(record.shape)} needs {expected}",
            hint="the file is damaged: download or convert it again",
        )


def _segments(records: Iterable[TensorRecord]) -> list[Segment]:
    """Page-aligned ranges that cover the records, file by file, laid one after the other in the slot."""
    found: list[Segment] = []
    end = 0
    for record in sorted(records, key=lambda record: (record.file, record.offset)):
        last = found[-1] if found else None
        if last and last.file == record.file and record.offset - end <= GAP_BYTES:
            end = max(end, record.offset + record.nbytes)
            found[-1] = replace(last, length=_up(end - last.file_offset, PAGE_BYTES))
        else:
            start, end = record.offset // PAGE_BYTES * PAGE_BYTES, record.offset + record.nbytes
            slot_offset = last.slot_offset + last.length if last else 0
            found.append(Segment(record.file, start, _up(end - start, PAGE_BYTES), slot_offset))
    return found


def _place(record: TensorRecord, segments: Iterable[Segment]) -> int:
    """The slot offset of `record`; an empty tensor may lie anywhere."""
    for segment in segments:
        inside = record.offset - segment.file_offset
        if record.nbytes and record.file == segment.file and inside >= 0 and inside + record.nbytes <= segment.length:
            return segment.slot_offset + inside
    return 0


def _held(block: nn.Module, image: BlockImage) -> dict[str, Tensor]:
    """The tensors of `block` that `image` names."""
    named = dict(_named(block))
    for view in image.tensors:
        if view.name not in named:
            raise ValueError(f"a block of type `{type(block).__name__}` has no tensor `{view.name}`")
        if named[view.name].requires_grad:
            raise ValueError(f"`{view.name}` is trainable: in an image it would lose what it learns")
    return {view.name: named[view.name] for view in image.tensors}


def _point(block: nn.Module, held: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Let the parameters and buffers `held` become these tensors, under names tied to them too."""
    wanted = {id(old): tensors[name] for name, old in held.items()}
    made: dict[int, Tensor] = {}
    for owner in [rows for module in block.modules() for rows in (module._parameters, module._buffers)]:
        for name, old in owner.items():
            new = wanted.get(id(old))
            if new is None:
                continue
            if old.is_meta == new.is_meta and isinstance(old, FakeTensor) == isinstance(new, FakeTensor):
                old.data = new
            else:
                frozen = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
                owner[name] = made.setdefault(id(old), frozen)


def _part(flat: Tensor, view: TensorView) -> Tensor:
    return flat[view.offset : view.offset + view.nbytes]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
