"""Resting: the bytes of a model's blocks and of what stands outside them, once techniques have changed it. Nothing is read."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from tightfit import catalog
from tightfit.describe.blocks import blocks_of
from tightfit.describe.skeleton import Skeleton


def resting_bytes(skeleton: Skeleton, techniques: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
    """(bytes of all blocks, bytes outside them); tied tensors count once."""
    model = skeleton.meta_model()
    made = [catalog.make(name, settings) for name, settings in techniques.items() if name != "offload"]
    for technique in sorted(made, key=lambda technique: technique.stage):
        technique.apply(model)
    inside = sum(_bytes(block) for _, block in blocks_of(model))
    return inside, _bytes(model) - inside


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])
