"""Build: carry a plan's structure out, block by block, each weight straight to its place. The dense model never exists whole."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tightfit import catalog
from tightfit.contracts import Initialises
from tightfit.describe.blocks import blocks_of
from tightfit.describe.skeleton import Skeleton
from tightfit.formats.image import BlockImage, copy_into, image_of, unbind
from tightfit.runtime import spread
from tightfit.runtime.link import pinned_empty
from tightfit.runtime.placing import Placing
from tightfit.runtime.spill import Spill
from tightfit.runtime.stream import Stream
from tightfit.terms.errors import TightfitError
from tightfit.terms.machine import Machine
from tightfit.terms.plan import Plan

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all) after each block."""


@dataclass
class Built:
    """A model that is ready to run, with whatever must be closed after it. Use it as a context manager.

    `device` is where inputs go and results are; of several GPUs the first.
    """

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
    device = spread.device(0) if plan.devices else torch.device("cuda" if plan.compute_tier == "gpu" else "cpu")
    spread.refuse_missing(plan)
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
    for number in spread.gpus_of(plan):
        whole = torch.cuda.get_device_properties(number).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (plan.budget.gpu - Machine.here().overhead_gpu) / whole), number)


def _fill(built: Built, progress: Progress) -> None:
    """Outside tensors first, then one block after the other; a block that will take turns leaves memory before the next is read."""
    placing = Placing(built.model, built.skeleton, built.device, built.plan.random_weights)
    settings = built.plan.techniques.get("offload")
    offload: Any = None if settings is None else catalog.make("offload", settings)
    streamed = set(offload.streamed) if offload else set()
    spill = built.held.enter_context(Spill())
    images: dict[int, BlockImage] = {}
    pinned: dict[int, Tensor] = {}
    placing.place_outside()
    for position, (path, block) in enumerate(blocks_of(built.model)):
        waits_in_ram = position in streamed and built.device.type == "cuda" and built.plan.residency[position] == "ram"
        image = placing.image_in_files(path, block) if position in streamed and not waits_in_ram else None
        if image is None:
            if built.plan.devices:
                placing.device = spread.device(built.plan.devices[position])
            placing.place_block(path)
            if built.plan.devices:
                spread.place_buffers(block, placing.device)
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
        progress(*placing.progress())
    if built.plan.devices:
        spread.spread_over(built.model, built.plan.devices)
    if offload:
        blocks = {position: block for position, (_, block) in enumerate(blocks_of(built.model)) if position in streamed}
        built.stream = built.held.enter_context(Stream(blocks, images, offload.slots, built.device, pinned))
        built.model.stream_socket.ring = built.stream
