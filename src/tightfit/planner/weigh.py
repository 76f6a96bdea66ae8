"""Weigh: the bytes of every block and of what stands outside them, once techniques have changed the model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from tightfit.contracts import Absorbs, Transform
from tightfit.describe.blocks import blocks_of


@dataclass(frozen=True)
class Weights:
    """Bytes as they will rest. `load_scratch` is the most that is alive beside the resting weights while they are read."""

    blocks: tuple[int, ...]
    outside: int
    changed: bool  # some blocks rest in another form than they are stored, so streaming them needs a spill file
    frozen_blocks: bool  # no parameter inside a block is trained
    load_scratch: int
    libraries: frozenset[str]


def weigh(make_model: Callable[[], nn.Module], techniques: Iterable[Transform]) -> Weights:
    """Apply `techniques` to a meta model and weigh it. Tied tensors count once."""
    model = make_model()
    largest_dense = max((tensor_bytes(parameter) for parameter in model.parameters()), default=0)
    for technique in sorted(techniques, key=lambda technique: technique.stage):
        technique.apply(model)
    blocks = [block for _, block in blocks_of(model)]
    inside = [sum(tensor_bytes(tensor) for tensor in _tensors(block)) for block in blocks]
    absorbing = [module for block in blocks for module in block.modules() if isinstance(module, Absorbs)]
    return Weights(
        blocks=tuple(inside),
        outside=sum(tensor_bytes(tensor) for tensor in _tensors(model)) - sum(inside),
        changed=bool(absorbing),
        frozen_blocks=not any(parameter.requires_grad for block in blocks for parameter in block.parameters()),
        load_scratch=2 * largest_dense if absorbing else 0,
        libraries=frozenset(_library(module) for module in absorbing) - {""},
    )


def tensor_bytes(tensor: object) -> int:
    """Bytes of one tensor, on any device."""
    return tensor.numel() * tensor.element_size()  # type: ignore[attr-defined]


def _tensors(module: nn.Module) -> list[object]:
    return [*module.parameters(), *module.buffers()]


def _library(module: nn.Module) -> str:
    """The foreign library that a quantized module loads, which adds to the process beside its tensors."""
    return "bitsandbytes" if "nf4" in type(module).__module__ else ""
