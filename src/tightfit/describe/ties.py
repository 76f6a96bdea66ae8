"""Ties: which weights the config ties though the checkpoint holds them apart. As `from_pretrained` decides, but before it loads."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from tightfit.formats.image import TensorRecord
from tightfit.terms.errors import TightfitError

_PIECE = 1 << 21
"""Elements that are compared at once."""


def stored_apart(model: nn.Module, stored: Mapping[str, TensorRecord]) -> tuple[str, ...]:
    """Names that are tied in `model`, but for which `stored` has other values than for the name they are tied to.

    Only weights that lie there twice are read, up to the first difference. Raises `TightfitError` for unreadable files.
    """
    stands_for: dict[str, str] = {}
    apart = []
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for name, source in model.all_tied_weights_keys.items():
        if name in stored and name in tensors:
            held = stands_for.setdefault(source, source if source in stored else name)
            if not _are_equal(stored[held], stored[name], tensors[name].dtype):
                apart.append(name)
    return tuple(apart)


def tied_heads(model: nn.Module) -> tuple[str, ...]:
    """Tied names that belong to the output embedding."""
    head = model.get_output_embeddings()
    return tuple(name for name in model.all_tied_weights_keys if head is not None and model.get_submodule(name.rpartition(".")[0]) is head)


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """Give each of `names` a parameter of its own on `meta`."""
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(torch.empty_like(model.get_parameter(name))))
        model.all_tied_weights_keys.pop(name)


def _are_equal(one: TensorRecord, other: TensorRecord, dtype: torch.dtype) -> bool:
    """In the precision `dtype`, in which they are loaded."""
    if one == other or one.shape != other.shape:
        return one == other
    if not Path(one.file).exists():
        return True  # still on the hub: what a config ties is taken for tied until its bytes are here
    elements = torch.Size(one.shape).numel()
    try:
        with open(one.file, "rb") as left, open(other.file, "rb") as right:
            left.seek(one.offset)
            right.seek(other.offset)
            counts = [min(_PIECE, elements - start) for start in range(0, elements, _PIECE)]
            return all(torch.equal(_next(left, one.dtype, count).to(dtype), _next(right, other.dtype, count).to(dtype)) for count in counts)
    except OSError as error:
        raise TightfitError(f"cannot read `{error.filename or one.file}`: {error.strerror}") from error


def _next(file: BinaryIO, dtype: torch.dtype, count: int) -> Tensor:
    data = bytearray(file.read(count * dtype.itemsize))
    if len(data) < count * dtype.itemsize:
        raise TightfitError(f"`{file.name}` ends too early", hint="it changed while it was read; fetch it again")
    return torch.frombuffer(data, dtype=dtype)
