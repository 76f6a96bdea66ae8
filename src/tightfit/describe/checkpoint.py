"""Checkpoint: where each tensor of a folder of safetensors lies. Only headers are read."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tightfit.formats.image import TensorRecord
from tightfit.terms.errors import TightfitError
from tightfit.terms.restore import restore

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_LARGEST_HEADER = 100_000_000
"""Bytes; the limit that the safetensors library sets itself."""


@dataclass(frozen=True)
class _Entry:
    """One tensor in a header, as safetensors writes it; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, ...]


def read_checkpoint(folder: Path) -> dict[str, TensorRecord]:
    """Every tensor of `folder` by its name in the checkpoint, from one safetensors file or from shards with an index.

    Raises `TightfitError` for a missing or truncated shard, an index that names a missing tensor, or no weights at all.
    """
    index, single = folder / INDEX, folder / SINGLE
    if index.exists() or single.exists():
        records = _read_sharded(folder, index) if index.exists() else read_header(single)
        if not records:
            raise TightfitError(f"the weights in `{folder}` hold no tensor", hint="fetch them again")
        return records
    other = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    raise TightfitError(
        f"`{folder}` holds no safetensors weights",
        hint=f"`{other[0]}` is a pickle; convert it with `save_pretrained`, which writes safetensors"
        if other
        else "expected `model.safetensors` or `model.safetensors.index.json`; `--random-weights` runs a shape without weights",
    )


def read_header(file: Path) -> dict[str, TensorRecord]:
    """The records of one safetensors file, checked against its length."""
    try:
        with file.open("rb") as stream:
            head = stream.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > _LARGEST_HEADER:
                raise TightfitError(f"`{file}` is not a safetensors file", hint="the download may be broken; fetch it again")
            header = json.loads(stream.read(length))
            size = os.fstat(stream.fileno()).st_size
        entries = restore(Mapping[str, _Entry], {name: entry for name, entry in header.items() if name != "__metadata__"})
        return {name: _record(file, name, entry, 8 + length, size) for name, entry in entries.items()}
    except OSError as error:
        raise TightfitError(f"cannot read `{file}`: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise TightfitError(f"the header of `{file}` is damaged", hint="the file may be truncated; fetch it again") from error


def _record(file: Path, name: str, entry: "_Entry", start: int, size: int) -> TensorRecord:
    record = record_of(file, name, entry.dtype, entry.shape, entry.data_offsets, start)
    end = record.offset + record.nbytes
    if end > size:
        raise TightfitError(
            f"`{file}` is truncated: `{name}` ends at byte {end}, the file at {size}", hint="fetch the file again; nothing was loaded"
        )
    return record


def record_of(
    file: Path, name: str, stored_dtype: str, shape: tuple[int, ...], data_offsets: tuple[int, ...], start: int = 0
) -> TensorRecord:
    """The record of what a header says of one tensor; its offsets count from `start`. Raises for what cannot be."""
    dtype = _DTYPES.get(stored_dtype)
    if dtype is None:
        raise TightfitError(f"`{name}` in `{file}` has the unknown dtype {stored_dtype}", hint="take a copy of the model in 16 or 32 bits")
    begin, end = data_offsets
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise ValueError(f"`{name}` has shape {shape} at {data_offsets}")
    if torch.Size(shape).numel() * dtype.itemsize != end - begin:
        raise TightfitError(
            f"`{name}` in `{file}` has {end - begin} bytes, its shape {list(shape)} needs another number", hint="fetch the file again"
        )
    return TensorRecord(file=str(file), offset=start + begin, nbytes=end - begin, dtype=dtype, shape=shape)


def _read_sharded(folder: Path, index: Path) -> dict[str, TensorRecord]:
    try:
        weight_map: dict[str, str] = restore(Mapping[str, str], json.loads(index.read_text())["weight_map"])
    except OSError as error:
        raise TightfitError(f"cannot read `{index}`: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TightfitError(f"`{index}` is not an index of shards", hint="fetch it again") from error
    missing = sorted({shard for shard in weight_map.values() if not (folder / shard).exists()})
    if missing:
        raise TightfitError(
            f"{len(missing)} of the shards are missing: {', '.join(missing[:3])}", hint=f"`{index.name}` names them; fetch them again"
        )
    shards = {shard: read_header(folder / shard) for shard in set(weight_map.values())}
    absent = [name for name, shard in weight_map.items() if name not in shards[shard]]
    if absent:
        raise TightfitError(
            f"`{index.name}` names `{absent[0]}`, which `{weight_map[absent[0]]}` does not hold ({len(absent)} such)",
            hint="index and shards are not of one model: fetch them again",
        )
    return {name: shards[shard][name] for name, shard in weight_map.items()}
