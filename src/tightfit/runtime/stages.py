"""Stages: the part of a model that one device of a pipeline runs, as `torch.distributed.pipelining` takes it.

On every device the model's own code runs, so that masks and positions are what they are in the whole model; the blocks of other stages
are hollow there, and hold no weights.
"""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from tightfit.describe.blocks import block_lists, blocks_of
from tightfit.runtime.hollow import Enough, handed_on
from tightfit.steps import without_cache
from tightfit.terms.errors import TightfitError


class Stage(nn.Module):
    """Blocks `first` to `last`, the last not among them, of a model with one stack of blocks; it takes the model over.

    The first stage has the embedding and takes ids, the last one has the head and gives what the model gives first (logits, or hidden
    states); between them hidden states travel.  # (batch, tokens) → (batch, tokens, d) → … → (batch, tokens, vocabulary)
    A head that is tied to the embedding stands on the first and on the last stage: while training, the sum of both gradients is its own.
    """

    def __init__(self, model: nn.Module, first: int, last: int) -> None:
        super().__init__()
        blocks = [block for _, block in blocks_of(model)]
        if len(block_lists(model)) != 1:
            raise TightfitError(f"`{type(model).__name__}` has {len(block_lists(model))} stacks of blocks; stages are cut out of one")
        if not 0 <= first < last <= len(blocks):
            raise TightfitError(
                f"there is no stage of the blocks {first} to {last} among {len(blocks)}", hint="a stage has a block at least"
            )
        self.model = model
        self.is_first, self.is_last = first == 0, last == len(blocks)
        self._first, self._last = blocks[first], blocks[last - 1]
        self._width: int = model.get_input_embeddings().embedding_dim  # type: ignore[operator]
        for block in blocks[:first] + blocks[last:]:
            _empty(block)
            block.forward = partial(_pass, block)
        if not self.is_last:
            _empty(model.get_output_embeddings())  # type: ignore[operator]
        if not self.is_first:
            _empty(model.get_input_embeddings())  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Ids or hidden states through the blocks of this stage."""
        leaving: list[Tensor] = []
        with ExitStack() as hooks:
            if not self.is_first:
                hooks.callback(self._first.register_forward_pre_hook(partial(_enter, x), with_kwargs=True).remove)
            if not self.is_last:
                hooks.callback(self._last.register_forward_hook(partial(_leave, leaving)).remove)
            with suppress(Enough):
                given = {"input_ids": x} if self.is_first else {"inputs_embeds": x.new_zeros(*x.shape[:2], self._width)}
                return self.model(**given, **without_cache(self.model, among_others=True))[0]
        return leaving[0]


def stages_of(device_of: Sequence[int]) -> list[tuple[int, range]]:
    """Devices in the order in which data flows, each with its blocks, from the device of each block.

    Raises `TightfitError` where a device would have to run twice, since a pipeline's stages hold neighbours.
    """
    found: list[tuple[int, range]] = []
    for position, device in enumerate(device_of):
        if found and found[-1][0] == device:
            found[-1] = device, range(found[-1][1].start, position + 1)
        elif any(device == earlier for earlier, _ in found):
            raise TightfitError(f"device {device} has blocks before and after those of another", hint="place with `--objective throughput`")
        else:
            found.append((device, range(position, position + 1)))
    return found


def _empty(module: nn.Module | None) -> None:
    """Let go of all tensors inside; the modules stay, since the model's code may ask them what kind they are."""
    for each in module.modules() if module else ():
        each._parameters = dict.fromkeys(each._parameters)
        each._buffers = dict.fromkeys(each._buffers)


def _pass(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return handed_on(block, args[0] if args else kwargs["hidden_states"])


def _enter(hidden: Tensor, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def _leave(leaving: list[Tensor], _block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
    leaving.append(output if isinstance(output, Tensor) else output[0])
    raise Enough
