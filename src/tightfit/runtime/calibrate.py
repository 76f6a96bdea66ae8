"""Calibrate: lead samples through a model block by block, and see what its layers are fed.

The hidden states of all samples stay at one block's door; which layers are fed alike, and the Hessian of what they are fed, is found by
letting them through that block alone. The model's own code says with what each block is called: it runs once with hollow blocks.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Enough(Exception):
    """The rest of a forward pass is not needed."""


@dataclass(frozen=True)
class Walk:
    """The way through a model's blocks. `rows` samples go at once; the hidden states of all rest in `file`, or in memory if None."""

    model: nn.Module
    blocks: list[tuple[str, nn.Module]]
    samples: Tensor  # (samples, tokens) of token ids
    rows: int
    device: torch.device
    file: Path | None = None


def first_states(walk: Walk) -> tuple[Tensor, list[dict[str, Any]]]:
    """What enters the first block for each sample, and what else each block is called with (masks, positions): alike for all samples.

    The model runs with hollow blocks, which hand on what they get and note what came with it.  # → (samples, tokens, d), a call a block
    """
    calls: list[dict[str, Any]] = [{} for _ in walk.blocks]
    states: list[Tensor] = []  # one, as soon as its width is known
    begin = 0

    def hollow(position: int, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        calls[position] = {"args": args[1:], "kwargs": {name: value for name, value in kwargs.items() if name != "hidden_states"}}
        if position == 0:
            if not states:
                states.append(_room(walk, hidden))
            states[0][begin : begin + len(hidden)] = hidden
        if position == len(walk.blocks) - 1:
            raise Enough
        return hidden if not _returns_tuple(walk.blocks[position][1]) else (hidden, None)

    with ExitStack() as hooks:
        for position, (_, block) in enumerate(walk.blocks):
            hooks.enter_context(_forward_of(block, partial(hollow, position)))
        for begin in range(0, len(walk.samples), walk.rows):  # `hollow` reads `begin`
            with suppress(Enough):
                walk.model(input_ids=walk.samples[begin : begin + walk.rows].to(walk.device), **_without_cache(walk.model))
    return states[0], calls


def _room(walk: Walk, hidden: Tensor) -> Tensor:
    """For the hidden states of all samples; on the disk as pages of a file, which the kernel may give up."""
    shape = (len(walk.samples), *hidden.shape[1:])
    if walk.file is None:
        return hidden.new_empty(shape)
    return torch.from_file(str(walk.file), shared=True, size=torch.Size(shape).numel(), dtype=hidden.dtype).view(shape)


def _without_cache(model: nn.Module) -> dict[str, Any]:
    """No keys and values are kept, where the model would."""
    return {"use_cache": False} if "use_cache" in inspect.signature(type(model).forward).parameters else {}


def _returns_tuple(block: nn.Module) -> bool:
    """Whether the class still hands on its hidden state as the first of several, as older ones do."""
    returns = str(type(block).forward.__annotations__.get("return", ""))
    return "tuple" in returns.lower() and "|" not in returns


@contextmanager
def _forward_of(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before


def _through(block: nn.Module, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
    output = block(hidden, *call["args"], **call["kwargs"])
    return output[0] if isinstance(output, tuple) else output


def alike(walk: Walk, block: nn.Module, layers: list[str], states: Tensor, call: Mapping[str, Any]) -> list[list[str]]:
    """Linear layers that are called with the very same tensor, in the order of their first call."""
    found: dict[int, list[str]] = {}
    kept: list[Tensor] = []  # so that no other tensor takes a freed one's place

    def note(name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        kept.append(args[0])
        names = found.setdefault(id(args[0]), [])
        if not any(name in others for others in found.values()):
            names.append(name)

    with ExitStack() as hooks:
        for name in layers:
            hooks.callback(block.get_submodule(name).register_forward_pre_hook(partial(note, name)).remove)
        _through(block, states[: walk.rows].to(walk.device), call)
    return [names for names in found.values() if names]


def hessian_of(walk: Walk, block: nn.Module, layer: nn.Module, states: Tensor, call: Mapping[str, Any]) -> Tensor:
    """The mean of `2 x xᵀ` over all tokens that `layer` is fed.  # → (columns, columns) float32"""
    seen = 0
    total: Tensor | None = None

    def gather(_module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal seen, total
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        total = x.new_zeros(x.shape[1], x.shape[1]) if total is None else total
        total.addmm_(x.t(), x, alpha=2.0)
        seen += len(x)
        raise Enough

    handle = layer.register_forward_pre_hook(gather)
    try:
        for part in states.split(walk.rows):
            with suppress(Enough):
                _through(block, part.to(walk.device), call)
    finally:
        handle.remove()
    assert total is not None
    return total.div_(seen)


def advance(walk: Walk, block: nn.Module, states: Tensor, call: Mapping[str, Any]) -> None:
    """Let all samples through the block as it is now, in place."""
    for part in states.split(walk.rows):
        part.copy_(_through(block, part.to(walk.device), call))
