"""Build: carry a plan's structure out, block by block, each weight straight to its place. The dense model never exists whole."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tightfit import catalog
from tightfit.contracts import Absorbs, Initialises
from tightfit.describe.blocks import adapted_name, blocks_of, names_in_files
from tightfit.describe.skeleton import Skeleton, persistent_buffers
from tightfit.formats.image import BlockImage, copy_into, image_in_files, image_of, unbind
from tightfit.runtime.link import pinned_empty
from tightfit.runtime.spill import Spill
from tightfit.runtime.stream import Stream
from tightfit.runtime.weights import reader
from tightfit.terms.errors import TightfitError
from tightfit.terms.machine import Machine
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
    for parameter in model.parameters():
        parameter.requires_grad_(plan.workload.task == "tune" and parameter.is_floating_point())  # codes never learn
    techniques = sorted((catalog.make(*item) for item in plan.techniques.items()), key=lambda technique: technique.stage)
    for technique in techniques:
        technique.apply(model)
    built = Built(model, skeleton, plan, device)
    try:
        if device.type == "cuda":
            _cap_allocator(plan)
        _fill(built, progress)
        for technique in techniques:
            if isinstance(technique, Initialises):
                technique.initialise(model)
    except BaseException:
        built.close()
        raise
    built.load_seconds = time.perf_counter() - began
    return built


def _cap_allocator(plan: Plan) -> None:
    """Let torch's allocator give its cache back, and in the end refuse, before it goes beyond the budget less the card's own overhead."""
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (plan.budget.gpu - Machine.here().overhead_gpu) / whole))


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
        waits_in_ram = position in streamed and built.device.type == "cuda" and built.plan.residency[position] == "ram"
        image = source.image_in_files(path, block) if position in streamed and not waits_in_ram else None
        if image is None:
            source.place_block(path)
            if position in streamed:
                image = image_of(block)
                if waits_in_ram:
                    pinned[position] = built.held.enter_context(pinned_empty(image.slot_bytes))
                    copy_into(block, image, pinned[position])
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


class _Source:
    """The dense parameters of the model on paper, and the places in the planned model that take them."""

    def __init__(self, built: Built) -> None:
        self.built = built
        self.dense = built.skeleton.meta_model()
        self.read = reader(built.skeleton, built.plan.random_weights)
        self.stored = {
            f"{path}.{name}" for path, module in self.dense.named_modules() if isinstance(module, Absorbs) for name in module._parameters
        }
        self.done = 0
        self.whole = sum(_bytes(parameter) for parameter in self.dense.parameters())
        self.names: dict[int, list[str]] = {}
        for name, parameter in self.dense.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), []).append(name)

    def progress(self) -> tuple[int, int]:
        """Bytes placed so far, and in all."""
        return self.done, self.whole

    def place_outside(self) -> None:
        """Place what belongs to no block, tied names together, and all buffers: those that no checkpoint holds are computed."""
        inside = tuple(f"{path}." for path, _ in blocks_of(self.dense))
        for names in self.names.values():
            if not names[0].startswith(inside):
                self._place(names, self.built.device)
        self._place_buffers()
        restore_buffers(self.built.model, self.built.device)

    def place_block(self, path: str) -> None:
        """Place all parameters of the block at `path`. On the compute device, where encoding is fast, even if it leaves again."""
        for names in self.names.values():
            if names[0].startswith(f"{path}."):
                self._place(names, self.built.device)

    def image_in_files(self, path: str, block: nn.Module) -> BlockImage | None:
        """The image of `block` straight in the checkpoint; None when it is quantized, converted, made up, or of another precision."""
        origins, stored = self.built.skeleton.origins, self.dense.get_submodule(path)
        state = stored.state_dict(keep_vars=True)
        dense = {name: state[name] for name in names_in_files(stored)}
        found = {name: origins.get(f"{path}.{name}") for name in dense}
        plain = all(origin and origin.conversion is None and origin.records[0].dtype == dense[name].dtype for name, origin in found.items())
        if self.built.plan.random_weights or not plain or self._absorbs(path, block):
            return None
        image = image_in_files({adapted_name(block, name): origin.records[0] for name, origin in found.items() if origin})
        if image is not None:
            self.done += sum(_bytes(parameter) for parameter in dense.values())
        return image

    def _absorbs(self, path: str, block: nn.Module) -> bool:
        """Whether a weight of `block` takes another form than it has in the checkpoint."""
        owners = [f"{path}.{inside}" for inside, module in block.named_modules() if isinstance(module, Absorbs)]
        return any(not isinstance(self.dense.get_submodule(owner.replace(".base_layer", "")), Absorbs) for owner in owners)

    def _place(self, names: list[str], device: torch.device) -> None:
        dense = self.read(names[0]).to(device)
        shared = nn.Parameter(dense, requires_grad=False)
        for name in names:
            parent, _, leaf = adapted_name(self.built.model, name).rpartition(".")
            owner = self.built.model.get_submodule(parent)
            if isinstance(owner, Absorbs) and name not in self.stored:
                self._absorb(owner, name, leaf, dense)
            else:
                shared.requires_grad_(shared.requires_grad or owner.get_parameter(leaf).requires_grad)
                owner._parameters[leaf] = shared
        self.done += _bytes(dense)

    def _place_buffers(self) -> None:
        """Small ones, so those of all blocks at once. Made-up weights leave them to be computed, as they are before training."""
        skeleton = self.built.skeleton
        for name in persistent_buffers(self.dense) if not self.built.plan.random_weights else ():
            if name in skeleton.origins or skeleton.live is not None:
                parent, _, leaf = adapted_name(self.built.model, name).rpartition(".")
                self.built.model.get_submodule(parent)._buffers[leaf] = self.read(name).to(self.built.device)

    def _absorb(self, owner: Absorbs, name: str, leaf: str, dense: Tensor) -> None:
        try:
            owner.absorb(leaf, dense)
        except TightfitError as error:
            raise TightfitError(f"`{name}`: {error}", hint=error.hint) from error


def restore_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies, position tables), as transformers does after loading.

    On `meta` they have no values; each module's own initialisation makes them anew, what was read is left alone.
    """
    for tensor in (*model.parameters(), *(buffer for buffer in model.buffers() if not buffer.is_meta)):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
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
