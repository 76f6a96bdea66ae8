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
"""From the name of a parameter or persistent buffer to its dense tensor on the CPU, in the precision of the model on paper."""

_POOL = 1 << 18
"""Random numbers that are drawn once and repeated: values do not matter for memory and speed, drawing billions would."""


def reader(skeleton: Skeleton, random_weights: bool) -> Read:
    """How the weights of `skeleton` are read."""
    if skeleton.live is not None:
        tensors = skeleton.live.state_dict(keep_vars=True)
        return lambda name: tensors[name].detach()
    if random_weights:
        return _random(skeleton)
    refuse_weightless(skeleton)
    model = skeleton.meta_model()
    alias, wanted = _aliases(model), model.state_dict(keep_vars=True)

    def read(name: str) -> Tensor:
        found = next((other for other in alias.get(name, [name]) if other in skeleton.origins), None)
        if found is None:
            raise TightfitError(f"`{name}` is not in the checkpoint")
        tensor = _join(found, skeleton.origins[found], model)
        if not _is_finite(tensor):
            raise TightfitError(
                f"`{name}` holds NaN or infinite values", hint="the checkpoint is damaged, or training diverged; nothing was run"
            )
        return tensor.to(wanted[name].dtype) if tensor.dtype.is_floating_point else tensor

    return read


def refuse_weightless(skeleton: Skeleton) -> None:
    """Raise for a preset, whose shape has no weights to read."""
    if not skeleton.origins and skeleton.live is None:
        raise TightfitError(
            f"`{skeleton.name}` is a preset: a shape without weights",
            hint="name a folder or a hub id that holds them, or run the shape with `--random-weights`, for memory and speed",
        )


def _is_finite(tensor: Tensor) -> bool:
    """NaN and infinity both come out as the least or the greatest. Takes no memory, and a twentieth of a sum's time."""
    if not tensor.dtype.is_floating_point or not tensor.numel():
        return True
    return all(math.isfinite(end.item()) for end in torch.aminmax(tensor))


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
    wanted = dict(skeleton.meta_model().named_parameters(remove_duplicate=False))
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(skeleton.dtype)

    def read(name: str) -> Tensor:
        shape, dtype = wanted[name].shape, wanted[name].dtype
        if len(shape) == 1:  # norms and biases
            return torch.ones(shape, dtype=dtype) if name.endswith("weight") else torch.zeros(shape, dtype=dtype)
        tensor = torch.empty(shape.numel(), dtype=dtype)
        for start in range(0, tensor.numel(), _POOL):
            part = tensor[start : start + _POOL]
            part.copy_(pool[: part.numel()])
        return tensor.view(shape)

    return read
