"""Calibrate: lead samples through a model block by block, and see what its layers are fed.

The hidden states of all samples stay at one block's door; which layers are fed alike, and the Hessian of what they are fed, is found by
letting them through that block alone. The model's own code says with what each block is called: it runs once with hollow blocks.
"""

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from tightfit.runtime.hollow import Enough, forward_of, handed_on
from tightfit.steps import without_cache
from tightfit.terms.errors import TightfitError
from tightfit.terms.quantizing import TOKENS_PER_COLUMN


@dataclass(frozen=True)
class Call:
    """What a block is called with beside its hidden state; or what a layer inside is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Walk:
    """The way through a model's blocks. `rows` samples go at once; the hidden states of all rest in `file`, or in memory if None."""

    model: nn.Module
    blocks: list[tuple[str, nn.Module]]
    samples: Tensor  # (samples, tokens) of token ids
    rows: int
    device: torch.device
    file: Path | None = None


def first_states(walk: Walk) -> tuple[Tensor, list[Call]]:
    """What enters the first block for each sample, and what else each block is called with (masks, positions): alike for all samples.

    The model runs with hollow blocks, which hand on what they get and note what came with it.  # → (samples, tokens, d), a call a block
    Raises `TightfitError` for a model that cannot be walked through so.
    """
    calls: dict[int, Call] = {}
    states: list[Tensor] = []  # one, as soon as its width is known
    begin, seen = 0, set[int]()

    def hollow(position: int, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        call = Call(args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states" and name not in _CACHES})
        if position in seen or not _same(calls.setdefault(position, call), call):
            raise _unlike(walk, "again for one pass" if position in seen else "with what depends on the text")
        seen.add(position)
        if position == 0:
            states or states.append(room(walk.file, hidden, (len(walk.samples), *hidden.shape[1:])))
            states[0][begin : begin + len(hidden)] = hidden
        if position == len(walk.blocks) - 1:
            raise Enough
        return handed_on(walk.blocks[position][1], hidden)

    with ExitStack() as hooks:
        for position, (_, block) in enumerate(walk.blocks):
            hooks.enter_context(forward_of(block, partial(hollow, position)))
        for begin in range(0, len(walk.samples), walk.rows):  # `hollow` reads `begin`
            seen.clear()
            with suppress(Enough), _one_line(walk):
                ids = walk.samples[begin : begin + walk.rows].to(walk.device)
                walk.model(input_ids=ids, **without_cache(walk.model, among_others=True))
    if sorted(calls) != list(range(len(walk.blocks))):
        raise _unlike(walk, "not at all")
    return states[0], [calls[position] for position in range(len(walk.blocks))]


_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")
"""Arguments that would let a block see what other samples left there."""


def _unlike(walk: Walk, how: str) -> TightfitError:
    return TightfitError(
        f"`{type(walk.model).__name__}` calls its blocks {how}, so that they cannot be solved one after the other",
        hint="`--technique rtn` needs no walk through them",
    )


@contextmanager
def _one_line(walk: Walk) -> Iterator[None]:
    """Models of another build fail on hollow blocks in their own many ways."""
    try:
        yield
    except (Enough, TightfitError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise TightfitError(
            f"`{type(walk.model).__name__}` cannot be walked through block by block: {why}",
            hint="`--technique rtn` needs no walk through the blocks",
        ) from error


def _same(one: Call, other: Call) -> bool:
    """Whether two batches call a block alike."""
    mine, its = (tree_flatten((call.args, call.kwargs)) for call in (one, other))
    return str(mine[1]) == str(its[1]) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape else not isinstance(a, Tensor)
        for a, b in zip(mine[0], its[0], strict=True)
    )


def room(path: Path | None, like: Tensor, shape: Sequence[int]) -> Tensor:
    """For the hidden states of all samples, in RAM; in a file as pages that the kernel may give up."""
    if path is None:
        return torch.empty(shape, dtype=like.dtype)
    count = torch.Size(shape).numel()
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, count * like.element_size())  # a full disk is told here, and not by a dead process
    except OSError as error:
        raise TightfitError(f"cannot write `{path}`: {error.strerror}", hint="make room, or give fewer samples") from error
    return torch.from_file(str(path), shared=True, size=count, dtype=like.dtype).view(shape)


def _through(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    output = block(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class Door:
    """A block, the hidden states of all samples that enter it, and what else it is called with.  # states: (samples, tokens, d)"""

    block: nn.Module
    states: Tensor
    call: Call


def twin_of(block: nn.Module) -> nn.Module:
    """Other modules around the very same tensors: layers that are replaced in the one stay in the other."""
    return copy.deepcopy(block, {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())})


def copied(walk: Walk, states: Tensor) -> Tensor:
    """The states once more, where they rest."""
    return room(walk.file and walk.file.with_stem(f"{DENSE}{walk.file.stem}"), states, states.shape).copy_(states)


DENSE = "dense-"
"""What the file of the dense model's states is called before its name."""


def alike(walk: Walk, door: Door, layers: list[str]) -> list[list[str]]:
    """Layers that are called with the very same tensor, in the order of their first call."""
    found: dict[int, list[str]] = {}
    kept: list[Tensor] = []  # so that no other tensor takes a freed one's place

    def note(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(_first(Call(args, kwargs)))
        names = found.setdefault(id(kept[-1]), [])
        if not any(name in others for others in found.values()):
            names.append(name)

    with ExitStack() as hooks:
        for name in layers:
            hooks.callback(door.block.get_submodule(name).register_forward_pre_hook(partial(note, name), with_kwargs=True).remove)
        _through(door.block, door.states[: walk.rows].to(walk.device), door.call)
    return [names for names in found.values() if names]


def hessian_of(walk: Walk, name: str, door: Door, dense: Door | None) -> tuple[Tensor, Tensor | None]:
    """The means of `2 x xᵀ` and of `2 y xᵀ` over all tokens: x is what the layer is fed, y what it is fed in the dense block.

    # → two of (columns, columns) float32; no second without a dense block, or where the layer (an expert) does not see every token, or few
    """

    def pairs() -> Iterator[tuple[Tensor, Tensor | None]]:
        for part in parts(walk):
            x = _fed(walk, name, door, part)
            if x is not None:
                whole = dense and len(x) == walk.samples[part].numel() and walk.samples.numel() >= TOKENS_PER_COLUMN * x.shape[1]
                yield x, _fed(walk, name, dense, part) if dense and whole else None

    return means_of(pairs())


def means_of(pairs: Iterable[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """The means of `2 x xᵀ` and of `2 y xᵀ` over all tokens; none of the second where a y is missing, or tokens are few.

    # x, y: (tokens, columns) float32
    """
    seen, hessian, cross = 0, torch.empty(0), None
    for x, y in pairs:
        if not seen:
            hessian = x.new_zeros(x.shape[1], x.shape[1])
            cross = None if y is None else torch.zeros_like(hessian)
        hessian.addmm_(x.t(), x, alpha=2.0)
        cross = None if cross is None or y is None or len(y) != len(x) else cross.addmm_(y.t(), x, alpha=2.0)
        seen += len(x)
    assert seen, "only layers that are called are solved for their inputs"
    return hessian.div_(seen), None if cross is None or seen < TOKENS_PER_COLUMN * len(cross) else cross.div_(seen)


def parts(walk: Walk) -> Iterator[slice]:
    """The samples that go through a block at once."""
    return (slice(at, at + walk.rows) for at in range(0, len(walk.samples), walk.rows))


def _fed(walk: Walk, name: str, door: Door, part: slice) -> Tensor | None:
    """What the layer is fed for some samples; None where it is not called.  # → (tokens, columns) float32"""
    call = called(walk, name, door, part)
    return _first(call).flatten(0, -2).float() if call else None


def _first(call: Call) -> Tensor:
    return (*call.args, *call.kwargs.values())[0]


def called(walk: Walk, name: str, door: Door, part: slice) -> Call | None:
    """What the layer is called with for some samples; None where it is not called."""
    found: list[Call] = []

    def take(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Call(args, kwargs))
        raise Enough

    handle = door.block.get_submodule(name).register_forward_pre_hook(take, with_kwargs=True)
    try:
        with suppress(Enough):
            _through(door.block, door.states[part].to(walk.device), door.call)
    finally:
        handle.remove()
    return found[0] if found else None


def advance(walk: Walk, door: Door) -> None:
    """Let all samples through the block as it is now, in place."""
    for part in door.states.split(walk.rows):
        part.copy_(_through(door.block, part.to(walk.device), door.call))
