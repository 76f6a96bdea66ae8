"""Spread: blocks that run on the GPU where their weights lie. The hidden states follow them, and what else a block is given comes along.

All that stands outside of blocks is on GPU 0: each stack begins there and its result comes back there, so the model's own code around
the blocks sees one device. A cache makes each layer's room where the layer's keys are, so it needs no moving.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tightfit.describe.blocks import block_lists, blocks_of
from tightfit.terms.errors import TightfitError
from tightfit.terms.plan import Plan

Send = Callable[[Tensor], Tensor]


def device(number: int) -> torch.device:
    """The GPU of this number."""
    return torch.device("cuda", number)


def sent(tensor: Tensor, there: torch.device) -> Tensor:
    """The tensor on the device `there`: itself where it is there already."""
    return tensor.to(there, non_blocking=True)


def gpus_of(plan: Plan) -> list[int | None]:
    """The numbers of the GPUs that hold blocks; None is the process's current one, which `accelerate launch` chooses."""
    return [*range(plan.gpus_used)] if plan.devices else [None] * plan.gpus_used


def refuse_missing(plan: Plan) -> None:
    """Raise `TightfitError` where torch sees fewer GPUs than the plan uses."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device(0).type == "cuda" and found < plan.gpus_used:
        if not found:
            raise TightfitError("the plan computes on a GPU, and torch finds none here", hint="plan again with `--ram` only")
        raise TightfitError(
            f"the plan spreads blocks over {plan.gpus_used} GPUs, and torch finds {found} here", hint="plan again for these"
        )


def spread_over(model: nn.Module, devices: Sequence[int]) -> None:
    """Let each block of `model` run on the device whose number stands at its position in `devices`; weights lie there already."""
    ends = [len(stack) for _, stack in block_lists(model)]
    last = {sum(ends[: number + 1]) - 1 for number in range(len(ends))}
    couriers = {number: _Courier(device(number)) for number in set(devices)}
    for position, (_, block) in enumerate(blocks_of(model)):
        back = device(0) if position in last and devices[position] else None
        block.forward = partial(_run_there, couriers[devices[position]], back, block.forward)


def place_buffers(block: nn.Module, there: torch.device) -> None:
    """Put the buffers of `block` beside its weights."""
    for module in block.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else sent(buffer, there)


class _Courier:
    """Sends to one device what blocks there are given. What every block is given again (masks, positions) is sent once."""

    def __init__(self, there: torch.device) -> None:
        self.there = there
        self._brought = WeakTensorKeyDictionary()  # forgotten with the tensor that was sent

    def hidden(self, tensor: Tensor) -> Tensor:
        """Hidden states: new for every block."""
        return sent(tensor, self.there)

    def shared(self, tensor: Tensor) -> Tensor:
        """What other blocks may be given too."""
        if tensor not in self._brought:
            self._brought[tensor] = sent(tensor, self.there)
        return self._brought[tensor]


def _run_there(courier: _Courier, back: torch.device | None, forward: Any, *args: Any, **kwargs: Any) -> Any:
    args = (*_moved(args[:1], courier.hidden), *_moved(args[1:], courier.shared))
    kwargs = {name: _moved(value, courier.hidden if name == "hidden_states" else courier.shared) for name, value in kwargs.items()}
    with _current(courier.there):
        output = forward(*args, **kwargs)
    return output if back is None else _moved(output, partial(sent, there=back))


def _current(there: torch.device) -> AbstractContextManager[Any]:
    """Kernels of Triton are launched on the current GPU, wherever their tensors lie."""
    return torch.cuda.device(there) if there.type == "cuda" else nullcontext()


def _moved(value: Any, send: Send) -> Any:
    """Tensors inside tuples, lists and mappings too; a cache is none of these, and stays what it is."""
    if isinstance(value, Tensor):
        return send(value)
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, send) for item in value)
    if type(value) is dict:
        return {name: _moved(item, send) for name, item in value.items()}
    return value
