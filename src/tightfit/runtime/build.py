"""Build: carry a plan's structure out, block by block, each weight straight to its place. The dense model never exists whole."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tightfit import catalog
from tightfit.contracts import Absorbs
from tightfit.describe.blocks import blocks_of
from tightfit.describe.skeleton import Skeleton
from tightfit.formats.image import BlockImage, copy_into, image_in_files, image_of, unbind
from tightfit.runtime.spill import Spill
from tightfit.runtime.stream import Stream
from tightfit.runtime.weights import reader
from tightfit.terms.errors import TightfitError
from tightfit.terms.plan import Plan

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all) after each block."""


@dataclass
class Built:
    """A model that is ready to run, with whatever must be closed after it. Use it as a context manager."""

    model: nn.Module
    skeleton: Skeleton
    plan: Plan
    device: torch.device
    load_seconds: float = 0.0
    stream: Stream | None = None
    held: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Built":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the stream and give up the spill file. Safe to call twice."""
        self.held.close()


def build(plan: Plan, skeleton: Skeleton, progress: Progress = lambda done, whole: None) -> Built:
    """Make the planned model and fill it. Raises `TightfitError`, and leaves nothing behind, when a weight is missing or damaged."""
    began = time.perf_counter()
    device = torch.device("cuda" if plan.compute_tier == "gpu" else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TightfitError("the plan computes on a GPU, and torch finds none here", hint="plan again with `--ram` only")
    model = skeleton.meta_model()
    if len(plan.residency) != len(blocks_of(model)):
        raise TightfitError(
            f"the plan places {len(plan.residency)} blocks, and `{skeleton.name}` has {len(blocks_of(model))}",
            hint="plan again: the model changed",
        )
    model.requires_grad_(plan.workload.task == "tune")
    for technique in sorted((catalog.make(*item) for item in plan.techniques.items()), key=lambda technique: technique.stage):
        technique.apply(model)
    built = Built(model, skeleton, plan, device)
    try:
        _fill(built, progress)
    except BaseException:
        built.close()
        raise
    built.load_seconds = time.perf_counter() - began
    return built


def _fill(built: Built, progress: Progress) -> None:
    """Outside tensors first, then one block after the other; a block that will take turns leaves memory before the next is read."""
    source = _Source(built)
    settings = built.plan.techniques.get("offload")
    offload: Any = None if settings is None else catalog.make("offload", settings)
    streamed = set(offload.streamed) if offload else set()
    spill = built.held.enter_context(Spill())
    images: dict[int, BlockImage] = {}
    pinned: dict[int, Tensor] = {}
    source.place_outside()
    for position, (path, block) in enumerate(blocks_of(built.model)):
        image = source.image_in_files(path, block) if position in streamed else None
        if image is None:
            source.place_block(path)
            if position in streamed:
                image = image_of(block)
                if built.plan.residency[position] == "ram" and built.device.type == "cuda":
                    pinned[position] = _pinned(block, image)
                else:
                    image = spill.write(block, image)
        if image is not None:
            unbind(block, image, built.device)
            images[position] = image
        progress(*source.progress())
    if offload:
        blocks = {position: block for position, (_, block) in enumerate(blocks_of(built.model)) if position in streamed}
        built.stream = built.held.enter_context(Stream(blocks, images, offload.slots, built.device, pinned))
        built.model.stream_socket.ring = built.stream


def _pinned(block: nn.Module, image: BlockImage) -> Tensor:
    flat = torch.empty(image.slot_bytes, dtype=torch.uint8, pin_memory=True)
    copy_into(block, image, flat)
    return flat


class _Source:
    """The dense parameters of the model on paper, and the places in the planned model that take them."""

    def __init__(self, built: Built) -> None:
        self.built = built
        self.dense = built.skeleton.meta_model()
        self.read = reader(built.skeleton, built.plan.random_weights)
        self.done = 0
        self.whole = sum(_bytes(parameter) for parameter in self.dense.parameters())
        self.names: dict[int, list[str]] = {}
        for name, parameter in self.dense.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), []).append(name)

    def progress(self) -> tuple[int, int]:
        """Bytes placed so far, and in all."""
        return self.done, self.whole

    def place_outside(self) -> None:
        """Place what belongs to no block, tied names together, and compute the buffers that no checkpoint holds."""
        inside = tuple(f"{path}." for path, _ in blocks_of(self.dense))
        for names in self.names.values():
            if not names[0].startswith(inside):
                self._place(names, self.built.device)
        restore_buffers(self.built.model, self.built.device)

    def place_block(self, path: str) -> None:
        """Place all parameters of the block at `path`. On the compute device, where encoding is fast, even if it leaves again."""
        for names in self.names.values():
            if names[0].startswith(f"{path}."):
                self._place(names, self.built.device)

    def image_in_files(self, path: str, block: nn.Module) -> BlockImage | None:
        """The image of `block` straight in the checkpoint; None when it is quantized, converted, made up, or of another precision."""
        origins = self.built.skeleton.origins
        names = [name for name, _ in self.dense.get_submodule(path).named_parameters()]
        found = {name: origins.get(f"{path}.{name}") for name in names}
        plain = all(
            origin and origin.conversion is None and origin.records[0].dtype == self.built.skeleton.dtype for origin in found.values()
        )
        if self.built.plan.random_weights or not plain or any(isinstance(module, Absorbs) for module in block.modules()):
            return None
        image = image_in_files({name: origin.records[0] for name, origin in found.items() if origin})
        if image is not None:
            self.done += sum(_bytes(parameter) for parameter in self.dense.get_submodule(path).parameters())
        return image

    def _place(self, names: list[str], device: torch.device) -> None:
        dense = self.read(names[0]).to(device)
        shared = nn.Parameter(dense, requires_grad=self.built.plan.workload.task == "tune")
        for name in names:
            parent, _, leaf = name.rpartition(".")
            owner = self.built.model.get_submodule(parent)
            if isinstance(owner, Absorbs):
                self._absorb(owner, name, leaf, dense)
            else:
                owner._parameters[leaf] = shared
        self.done += _bytes(dense)

    def _absorb(self, owner: Absorbs, name: str, leaf: str, dense: Tensor) -> None:
        try:
            owner.absorb(leaf, dense)
        except TightfitError as error:
            raise TightfitError(f"`{name}`: {error}", hint=error.hint) from error


def restore_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies, position tables), as transformers does after loading.

    On `meta` they have no values; each module's own initialisation makes them anew, parameters are left alone.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in model.modules():
        lost = {name: buffer for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
        if lost and not isinstance(module, Absorbs):
            for name, buffer in lost.items():
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
            model._init_weights(module)
            for name in lost:
                module._buffers[name] = module._buffers[name].to(device)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
