"""Digest: tell by a short word whether a model has the weights it had before. Reads samples, so that 10 GB take no longer than 1."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.describe.skeleton import Origin, Skeleton, persistent_buffers
from tightfit.formats.image import TensorRecord
from tightfit.terms.errors import TightfitError

SAMPLE_BYTES = 4096
"""Read at the start, in the middle and at the end of each tensor. Training moves all numbers, a broken download whole pages."""

_TELLING = re.compile(
    r"(^|_)(heads?|rope|rotary|theta|eps|epsilon|act|activation|function|scal\w*|multiplier|tok|window|types?|alibi)(_|$)"
)
"""Parts of the names of config values that change what a model says, and that the shapes of its tensors do not tell."""


def digest_of(skeleton: Skeleton) -> str:
    """`sha256:…` over names, precisions, shapes and samples of the weights, and over the config where it tells more than these.

    The same for the same weights in other files or shards, tied ones stored once or twice, or live where `from_pretrained` keeps them
    as they are stored (it joins the experts of a mixture). `shape:…` for a preset, or what else has no weights: of names, precisions
    and shapes only. Raises `TightfitError` for files that cannot be read.
    """
    digest = hashlib.sha256(_said([skeleton.model_class.__name__, *_telling(skeleton.config.to_dict())]))
    with ExitStack() as held:
        samples = _samples(skeleton, _Files(held))
        for name, tensor in _weights(skeleton.meta_model()):
            digest.update(_said([name, str(tensor.dtype), list(tensor.shape)]))
            for part in samples(name, tensor):
                digest.update(part)
    return f"{'sha256' if _has_weights(skeleton) else 'shape'}:{digest.hexdigest()}"


def _has_weights(skeleton: Skeleton) -> bool:
    if skeleton.live is not None:
        return not any(parameter.is_meta for parameter in skeleton.live.parameters())
    return bool(skeleton.origins)


def _samples(skeleton: Skeleton, files: "_Files") -> Any:
    """From a tensor of the model on paper to the bytes that are sampled of it."""
    if not _has_weights(skeleton):
        return lambda name, tensor: ()
    if skeleton.live is not None:
        live = skeleton.live.state_dict(keep_vars=True)
        return lambda name, tensor: _of_live(live[name])
    names: dict[int, list[str]] = {}
    model = skeleton.meta_model()
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    tied = {name: group for group in names.values() for name in group}

    def stored(name: str, tensor: Tensor) -> Iterator[bytes]:
        found = next((skeleton.origins[other] for other in tied.get(name, [name]) if other in skeleton.origins), None)
        return _of_files(found, tensor.dtype, files) if found else iter(())

    return stored


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, tied ones once, and the buffers that a checkpoint must hold, by name."""
    may_be_missing = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    found: dict[str, Tensor] = dict(model.named_parameters()) | persistent_buffers(model)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    for name in sorted(found.keys() - tied):
        if isinstance(found[name], nn.Parameter) or not any(pattern.search(name) for pattern in may_be_missing):
            yield name, found[name]


def _of_live(tensor: Tensor) -> Iterator[bytes]:
    flat = tensor.detach().flatten()
    for start, count in _ranges(flat.numel(), tensor.dtype.itemsize):
        yield _bytes(flat[start : start + count])


def _of_files(origin: Origin, dtype: torch.dtype, files: "_Files") -> Iterator[bytes]:
    """In the precision that the weights are loaded in; parts that are joined as they are stored, by their names in the checkpoint."""
    keys = [key for key, _ in origin.sources] or [""] * len(origin.records)
    for key, record in sorted(zip(keys, origin.records, strict=True), key=lambda part: part[0]):
        if origin.conversion is not None:
            yield _said([key, str(record.dtype), list(record.shape)])
        for start, count in _ranges(torch.Size(record.shape).numel(), record.dtype.itemsize):
            stored = torch.frombuffer(bytearray(files.read(record, start, count)), dtype=record.dtype)
            yield _bytes(stored if origin.conversion is not None else stored.to(dtype))


def _ranges(elements: int, itemsize: int) -> list[tuple[int, int]]:
    """Start and count of what is sampled: all of a small tensor."""
    count = SAMPLE_BYTES // itemsize
    if elements <= 3 * count:
        return [(0, elements)] if elements else []
    return [(0, count), ((elements - count) // 2, count), (elements - count, count)]


def _bytes(flat: Tensor) -> bytes:
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()


class _Files:
    """Files that are opened once, and closed with `held`."""

    def __init__(self, held: ExitStack) -> None:
        self.held = held
        self.open: dict[str, int] = {}

    def read(self, record: TensorRecord, start: int, count: int) -> bytes:
        """`count` elements of the tensor from element `start` on."""
        size = record.dtype.itemsize
        try:
            if record.file not in self.open:
                self.open[record.file] = os.open(record.file, os.O_RDONLY)
                self.held.callback(os.close, self.open[record.file])
            data = os.pread(self.open[record.file], count * size, record.offset + start * size)
        except FileNotFoundError as error:
            raise TightfitError(
                f"`{record.file}` is not here, so nothing can tell which weights it holds", hint="fetch it first"
            ) from error
        except OSError as error:
            raise TightfitError(f"cannot read `{record.file}`: {error.strerror}") from error
        if len(data) < count * size:
            raise TightfitError(f"`{record.file}` ends too early", hint="it changed while it was read; fetch it again")
        return data


def _telling(values: Mapping[str, Any], path: str = "") -> list[list[Any]]:
    """Paths and values of what the config tells beyond shapes, in order. What is left open is left out."""
    found: list[list[Any]] = []
    for key in sorted(values):
        value, at = values[key], f"{path}{key}"
        if isinstance(value, Mapping):
            found += _telling(value, f"{at}.")
        elif value is not None and _TELLING.search(at.replace(".", "_")) and key not in ("model_type", "transformers_version"):
            found.append([at, value])
    return found


def _said(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode() + b"\n"
