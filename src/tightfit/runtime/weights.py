"""Weights: read one dense tensor at a time, straight from its place in the checkpoint, or make a random one of its shape."""

import copy
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tightfit.describe.skeleton import Origin, Skeleton
from tightfit.formats.image import TensorRecord
from tightfit.terms.errors import TightfitError

Read = Callable[[str], Tensor]
"""From a parameter's name to its dense tensor on the CPU, in the stored precision."""

_POOL = 1 << 22
"""Random numbers that are drawn once and repeated: values do not matter for memory and speed, drawing billions would."""


def reader(skeleton: Skeleton, random_weights: bool) -> Read:
    """How the weights of `skeleton` are read."""
    if skeleton.live is not None:
        tensors = skeleton.live.state_dict(keep_vars=True)
        return lambda name: tensors[name].detach()
    if random_weights:
        return _random(skeleton)
    if not skeleton.origins:
        raise TightfitError(
            f"`{skeleton.name}` is a preset: a shape without weights",
            hint="name a folder or a hub id that has them; `--random-weights` runs the shape alone, for memory and speed",
        )
    model = skeleton.meta_model()
    alias = _aliases(model)

    def read(name: str) -> Tensor:
        found = next((other for other in alias.get(name, [name]) if other in skeleton.origins), None)
        if found is None:
            raise TightfitError(f"`{name}` is not in the checkpoint")
        tensor = _join(found, skeleton.origins[found], model)
        if not _is_finite(tensor):
            raise TightfitError(
                f"`{name}` holds NaN or infinite values", hint="the checkpoint is damaged, or training diverged; nothing was run"
            )
        return tensor.to(skeleton.dtype) if tensor.dtype.is_floating_point else tensor

    return read


def _is_finite(tensor: Tensor) -> bool:
    """A sum is finite if all its terms are; part by part, since torch makes a float32 copy of what it sums."""
    parts = tensor.reshape(-1).split(_POOL) if tensor.dtype.is_floating_point else ()
    return all(math.isfinite(part.sum(dtype=torch.float32).item()) for part in parts)


def read_record(record: TensorRecord) -> Tensor:
    """One tensor from its bytes in a file; the file's pages are not kept in the page cache."""
    flat = torch.empty(record.nbytes, dtype=torch.uint8)
    try:
        file = os.open(record.file, os.O_RDONLY)
    except OSError as error:
        raise TightfitError(f"cannot read `{record.file}`: {error.strerror}") from error
    try:
        view, done = memoryview(flat.numpy()), 0
        while done < record.nbytes:
            count = os.preadv(file, [view[done : done + (1 << 26)]], record.offset + done)
            if count == 0:
                raise TightfitError(f"`{record.file}` ends too early", hint="it changed while it was read; fetch it again")
            os.posix_fadvise(file, record.offset + done, count, os.POSIX_FADV_DONTNEED)
            done += count
    except OSError as error:
        raise TightfitError(f"cannot read `{record.file}`: {error.strerror}") from error
    finally:
        os.close(file)
    return flat.view(record.dtype).view(record.shape)


def _join(name: str, origin: Origin, model: nn.Module) -> Tensor:
    """The tensor `name`: read as it is, or joined by the conversion that transformers names for it (fused experts)."""
    if origin.conversion is None:
        return read_record(origin.records[0])
    conversion = copy.deepcopy(origin.conversion)
    for (key, pattern), record in zip(origin.sources, origin.records, strict=True):
        conversion.add_tensor(name, key, pattern, lambda record=record: read_record(record))
    joined = conversion.convert(name, model=model, config=model.config)[name]
    return joined[0] if isinstance(joined, list) else joined


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() for name in group}


def _random(skeleton: Skeleton) -> Read:
    shapes = {name: parameter.shape for name, parameter in skeleton.meta_model().named_parameters(remove_duplicate=False)}
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(skeleton.dtype)

    def read(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) == 1:  # norms and biases
            return torch.ones(shape, dtype=skeleton.dtype) if name.endswith("weight") else torch.zeros(shape, dtype=skeleton.dtype)
        tensor = torch.empty(shape.numel(), dtype=skeleton.dtype)
        for start in range(0, tensor.numel(), _POOL):
            part = tensor[start : start + _POOL]
            part.copy_(pool[: part.numel()])
        return tensor.view(shape)

    return read
