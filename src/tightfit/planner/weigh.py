"""Weigh: the bytes of every block and of what stands outside them, once techniques have changed the model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from tightfit.contracts import Absorbs, Transform
from tightfit.describe.blocks import blocks_of
from tightfit.describe.skeleton import Skeleton
from tightfit.formats.image import PIECE_BYTES, READERS, image_in_files, staging_bytes

ENCODING = 2.5
"""Bytes that a codec holds while it encodes, over the dense matrix's; measured with the allocator's records: int8 1.5, nf4 2.4."""
SUMMING = 16 << 20
"""Bytes of the float32 copy that checking a tensor for NaN makes, part by part."""


@dataclass(frozen=True)
class Weights:
    """Bytes as they will rest. `load_scratch` is the most that is alive beside the resting weights while they are read."""

    blocks: tuple[int, ...]
    outside: int
    stored: int  # the dense checkpoint, which loading reads
    changed: bool  # blocks rest in another form than they are stored, if they are at all, so streaming them needs a spill file
    frozen_blocks: bool  # no parameter inside a block is trained
    load_scratch: int
    passing: int  # what passes through RAM on its way to a GPU: the largest dense tensor, and the readers' buffers
    staging: int  # what readers hold beside the slots while blocks stream straight from the checkpoint
    libraries: frozenset[str]


def weigh(skeleton: Skeleton, techniques: Iterable[Transform], random_weights: bool = False) -> Weights:
    """Apply `techniques` to the meta model and weigh it. Tied tensors count once."""
    model = skeleton.meta_model()
    paths = [path for path, _ in blocks_of(model)]
    dense = dict(model.named_parameters())
    for technique in sorted(techniques, key=lambda technique: technique.stage):
        technique.apply(model)
    blocks = [block for _, block in blocks_of(model)]
    inside = [sum(tensor_bytes(tensor) for tensor in _tensors(block)) for block in blocks]
    absorbing = [module for block in blocks for module in block.modules() if isinstance(module, Absorbs)]
    changed = (
        bool(absorbing) or random_weights or any(_is_rewritten(skeleton, path, block) for path, block in zip(paths, blocks, strict=True))
    )
    return Weights(
        blocks=tuple(inside),
        outside=sum(tensor_bytes(tensor) for tensor in _tensors(model)) - sum(inside),
        stored=sum(tensor_bytes(parameter) for parameter in dense.values()),
        changed=changed,
        frozen_blocks=not any(parameter.requires_grad for block in blocks for parameter in block.parameters()),
        load_scratch=_load_scratch(model, dense, skeleton),
        passing=max((tensor_bytes(parameter) for parameter in dense.values()), default=0) + READERS * PIECE_BYTES,
        staging=0 if changed else max((_staging(skeleton, path) for path in paths), default=0),
        libraries=frozenset(_library(module) for module in absorbing) - {""},
    )


def _load_scratch(model: nn.Module, dense: Mapping[str, nn.Parameter], skeleton: Skeleton) -> int:
    """The largest dense tensor that is alive beside the resting weights: what is encoded or joined; the rest is read into place.

    Encoding works through slices, and holds about `ENCODING` times one matrix beside the dense tensor; joining holds parts and whole.
    """
    encoded = {f"{path}.{name}" for path, module in model.named_modules() if isinstance(module, Absorbs) for name in _leaves(path, dense)}
    scratch = min(SUMMING, 4 * max((parameter.numel() for parameter in dense.values()), default=0))
    for name, parameter in dense.items():
        joined = name in skeleton.origins and skeleton.origins[name].conversion is not None
        matrix = tensor_bytes(parameter) // (parameter.shape[0] if parameter.dim() == 3 else 1)
        needed = tensor_bytes(parameter) * ((name in encoded) + joined) + (int(ENCODING * matrix) if name in encoded else 0)
        scratch = max(scratch, needed)
    return scratch


def _is_rewritten(skeleton: Skeleton, path: str, block: nn.Module) -> bool:
    """Whether the block cannot stream as it lies in the checkpoint: it is live, joined from parts, or of another precision."""
    if skeleton.live is not None:
        return True
    found = [skeleton.origins[f"{path}.{name}"] for name, _ in block.named_parameters() if f"{path}.{name}" in skeleton.origins]
    return any(origin.conversion is not None or origin.records[0].dtype != skeleton.dtype for origin in found)


def _leaves(path: str, dense: Mapping[str, nn.Parameter]) -> list[str]:
    return [name.rpartition(".")[2] for name in dense if name.rpartition(".")[0] == path]


def _staging(skeleton: Skeleton, path: str) -> int:
    """As if aligned where nothing is known (a preset without weights)."""
    origins = {name: origin for name, origin in skeleton.origins.items() if name.startswith(f"{path}.")}
    if not origins or any(origin.conversion is not None for origin in origins.values()):
        return 0
    image = image_in_files({name: origin.records[0] for name, origin in origins.items()})
    return staging_bytes(image) if image else 0


def tensor_bytes(tensor: object) -> int:
    """Bytes of one tensor, on any device."""
    return tensor.numel() * tensor.element_size()  # type: ignore[attr-defined]


def _tensors(module: nn.Module) -> list[object]:
    return [*module.parameters(), *module.buffers()]


def _library(module: nn.Module) -> str:
    """The foreign library that a quantized module loads, which adds to the process beside its tensors."""
    return "bitsandbytes" if "nf4" in type(module).__module__ else ""
