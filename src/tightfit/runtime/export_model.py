"""Export model: write a quantized folder anew in another program's format, file by file and tensor by tensor. No model is built."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from tightfit.describe.checkpoint import INDEX, read_checkpoint
from tightfit.describe.skeleton import Skeleton
from tightfit.describe.source import describe
from tightfit.formats.linear import QuantizedLinear
from tightfit.runtime.export import new_folder
from tightfit.runtime.export_formats import FORMATS, Later, ModelFormat, StoredLayer
from tightfit.runtime.files import copy_companions, header_of, read_json, replacing, write_json
from tightfit.runtime.weights import read_record
from tightfit.terms.errors import TightfitError

Progress = Callable[[int, int, str], None]
"""Told (bytes written, bytes in all, the tensor's name) after each tensor."""


def export_model(folder: str | Path, out: str | Path, to: str, progress: Progress = lambda done, whole, name: None) -> int:
    """Write the quantized model in `folder` to `out` in the format `to`, a key of `FORMATS`. Returns the bytes of its tensors.

    Raises `TightfitError` for all that the format cannot hold, and for an `out` that holds something; then nothing is written.
    """
    skeleton, model = _described(folder, FORMATS[to])
    assert skeleton.stored is not None
    source, layers = Path(skeleton.folder), list(_layers(skeleton, model))
    with new_folder(Path(out)) as made:
        form = FORMATS[to].fitted(layers)
        shards = _shards(source, form, layers)
        whole, done = sum(later.nbytes for shard in shards.values() for later in shard.values()), 0

        def written(name: str, size: int) -> None:
            nonlocal done
            done += size
            progress(done, whole, name)

        for file, tensors in shards.items():
            _write(made / file, tensors, written)
        if (source / INDEX).exists():
            places = {name: file for file, tensors in shards.items() for name in tensors}
            write_json(made / INDEX, {"metadata": {"total_size": whole}, "weight_map": places})
        config = read_json(source / "config.json")
        write_json(made / "config.json", {**config, "quantization_config": form.note(skeleton.stored, model)})
        copy_companions(skeleton.folder, made)
    return whole


def _described(folder: str | Path, form: ModelFormat) -> tuple[Skeleton, nn.Module]:
    """The model on paper, and its meta module. Refuses what `form` cannot hold."""
    skeleton = describe(str(folder), "embed")
    stored = skeleton.stored
    again = "quantize the original model with `--technique lean:grid=affine` or `--technique gptq`"
    if stored is None:
        raise TightfitError(f"`{folder}` holds a dense model, and `{form.name}` is for quantized ones", hint=again)
    if stored.format != "affine":
        raise TightfitError(f"the weights in `{folder}` lie on tables of values, and `{form.name}` holds evenly spaced ones", hint=again)
    if stored.bits not in form.bits:
        known = ", ".join(map(str, form.bits))
        raise TightfitError(f"`{form.name}` files hold {known} bits, not {stored.bits}", hint="`--to gptq` holds them")
    model = skeleton.meta_model()
    for path in stored.layers:
        layer = model.get_submodule(path)
        if not isinstance(layer, QuantizedLinear):
            raise TightfitError(
                f"`{path}` holds the experts of a mixture in one, for which `{form.name}` has no layout", hint="tightfit runs it as it is"
            )
        form.check(path, layer)
    return skeleton, model


def _layers(skeleton: Skeleton, model: nn.Module) -> Iterator[StoredLayer]:
    assert skeleton.stored is not None
    for path in skeleton.stored.layers:
        layer = model.get_submodule(path)
        assert isinstance(layer, QuantizedLinear)
        codes, scale, zero = (skeleton.origins[f"{path}.{name}"].records[0] for name in layer.stored_names)
        group = skeleton.stored.group or layer.in_features
        yield StoredLayer(path, layer.out_features, layer.in_features, skeleton.stored.bits, group, layer.dtype, codes, scale, zero)


def _shards(source: Path, form: ModelFormat, layers: list[StoredLayer]) -> dict[str, dict[str, Later]]:
    """What each file will hold: the files are those of the source, with their dense tensors."""
    shards: dict[str, dict[str, Later]] = {}
    weights = {layer.codes: layer for layer in layers}
    beside = {record for layer in layers for record in (layer.scale, layer.zero)}
    for name, record in read_checkpoint(source).items():
        shard = shards.setdefault(Path(record.file).name, {})
        if record in weights:
            inside = form.tensors(weights[record])
            shard |= {f"{name.removesuffix('weight')}{leaf}": later for leaf, later in inside.items()}
        elif record not in beside:
            shard[name] = Later(record.dtype, record.shape, partial(read_record, record))
    return {file: shard for file, shard in sorted(shards.items()) if shard}


def _write(file: Path, tensors: Mapping[str, Later], written: Callable[[str, int], None]) -> None:
    """A safetensors file; each tensor is made when its turn comes, and told with its bytes."""
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # the widest first, so that each lies aligned
    with replacing(file) as stream:
        stream.write(header_of({name: (tensors[name].dtype, tensors[name].shape) for name in names}))
        for name in names:
            later = tensors[name]
            tensor = later.make()
            assert (tensor.dtype, tuple(tensor.shape)) == (later.dtype, later.shape), name
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            del tensor  # else two would be there while the next one is made
            written(name, later.nbytes)
