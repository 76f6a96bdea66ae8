"""Files: written whole or not at all. Whoever reads, at any moment and after any end, finds the old file or the new one."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tightfit.terms.errors import TightfitError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "generation_config.json",
)
"""Files beside a model's weights that belong to its words, and do not change when it is tuned."""


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes take the place of `file` once all are on the disk. After a fault the old file is still there."""
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
        settle(file.parent)
    except OSError as error:
        raise TightfitError(f"cannot write `{file}`: {error.strerror}", hint="is the disk full, or the folder read-only?") from error
    finally:
        part.unlink(missing_ok=True)


def settle(path: Path) -> None:
    """Make sure that a file's bytes, or the names in a folder, outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """One JSON object, as a person reads it."""
    with replacing(file) as stream:
        stream.write((json.dumps(values, indent=2, default=list) + "\n").encode())


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file. One tensor is copied at a time, where the safetensors library would copy all at once."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # the widest first, so that each lies aligned
    with replacing(file) as stream:
        stream.write(header_of({name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in names}))
        for name in names:
            stream.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def header_of(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """What a safetensors file begins with, for tensors that follow in this order."""
    end, header = 0, {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}  # type: ignore[dict-item]
    said = json.dumps(header).encode()
    said += b" " * (-len(said) % 8)
    return len(said).to_bytes(8, "little") + said


def read_json(file: Path) -> dict[str, Any]:
    """One JSON object. Raises `TightfitError` for a file that is missing or holds anything else."""
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise TightfitError(f"`{file.name}` is missing from `{file.parent}`", hint="take the folder from a copy, or tune again") from error
    except OSError as error:
        raise TightfitError(f"cannot read `{file}`: {error.strerror}") from error
    except ValueError as error:
        raise TightfitError(f"`{file}` is not JSON: {error}", hint="it is damaged; take it from a copy") from error
    if not isinstance(values, dict):
        raise TightfitError(f"`{file}` is not a JSON object", hint="it is damaged; take it from a copy")
    return values


def copy_companions(base_folder: str, folder: Path) -> None:
    """Copy what belongs to a model's words beside its weights; nothing where the base has no folder."""
    for pattern in _COMPANIONS if base_folder else ():
        for file in Path(base_folder).glob(pattern):
            with replacing(folder / file.name) as stream:
                stream.write(file.read_bytes())
