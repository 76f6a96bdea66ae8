"""Fake: a meta model's tensors become fake CPU tensors, and a workload becomes fake inputs. Nothing is allocated.

A CPU-only torch cannot make fake CUDA tensors, so the compute tier is always rehearsed on CPU-typed ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tightfit.describe.lengths import check_lengths
from tightfit.terms.workload import Workload


def materialize(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Replace each parameter and buffer of `model` by `make(tensor)`; tied tensors stay tied, and gradients flags are kept."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = _as_parameter(make(parameter), parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in made:
                    made[id(buffer)] = make(buffer) if buffer.device.type == "meta" else buffer
                module._buffers[name] = made[id(buffer)]


def _as_parameter(tensor: Tensor, requires_grad: bool) -> Tensor:
    """`nn.Parameter` marks a tensor of another class so too, but detaches it first."""
    if isinstance(tensor, FakeTensor):
        tensor._is_param = True
        return tensor.requires_grad_(requires_grad)
    return nn.Parameter(tensor, requires_grad=requires_grad)


def fake_on_cpu(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake CPU tensor of the same shape and dtype. Made by hand, since asking `mode` for thousands takes a second."""
    return FakeTensor(mode, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), torch.device("cpu"))


def empty_like_on_cpu(tensor: Tensor) -> Tensor:
    """An empty CPU tensor of the same shape and dtype; fake inside `FakeTensorMode`."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def inputs_for(model: nn.Module, workload: Workload, make: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """The batch that `workload` feeds to `model`: token ids or pixels, and labels when tuning.

    `make(shape, high)` gives whole numbers below `high`; by default zeros. For images the config sets the size.
    """
    ids = make or (lambda shape, high: torch.zeros(shape, dtype=torch.long))
    config, batch = model.config, workload.rows
    tuning = workload.task == "tune"
    if hasattr(config, "image_size"):
        size = config.image_size
        pixels = ids((batch, config.num_channels, size, size), 256).to(_floating(model)) / 128 - 1
        return {"pixel_values": pixels} | ({"labels": ids((batch,), config.num_labels)} if tuning else {})
    check_lengths(config, workload.tokens, workload.new_tokens if workload.task == "generate" else 0)
    tokens = ids((batch, workload.tokens), config.get_text_config().vocab_size)
    if not tuning:
        return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if config.is_encoder_decoder and workload.task == "embed" else {})
    if config.is_encoder_decoder:
        target = ids((batch, workload.target_tokens), config.get_text_config().vocab_size) if workload.target_tokens else tokens
        mask = torch.ones_like(tokens)
        mask[0, -1] = 0  # as with prompts of unlike lengths: transformers drops a mask that hides nothing, where it can look
        return {"input_ids": tokens, "attention_mask": mask, "labels": target}
    return {"input_ids": tokens} | ({"labels": tokens} if _has_head(model) else {})


@contextmanager
def one_sequence_per_row() -> Iterator[None]:
    """Let transformers know what it would read from real position ids: no row packs several sequences.

    On fake tensors it cannot look, so it would build a mask of tokens × tokens that no real run has.
    """
    from transformers import masking_utils

    look = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = look


@contextmanager
def convertible_modules() -> Iterator[None]:
    """Let `module.to(dtype)` inside a forward pass (routers do it) replace fake parameters; torch itself can only swap real ones."""

    def convert(self: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(change)
        for owner in (self._parameters, self._buffers):
            for name, tensor in owner.items():
                if tensor is not None and (new := change(tensor)) is not tensor:
                    owner[name] = nn.Parameter(new.detach(), tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return self

    usual = nn.Module._apply
    nn.Module._apply = convert  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module._apply = usual  # type: ignore[method-assign]


def _has_head(model: nn.Module) -> bool:
    return model.get_output_embeddings() is not None


def _floating(model: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point)
