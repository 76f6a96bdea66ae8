"""Replay: run a recorded step again, call by call, on real tensors. What it gives must equal what the module gives."""

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tightfit.describe.tape import Call, Tape, Window
from tightfit.terms.errors import TightfitError

Timed = Callable[[Callable[[], Any]], Any]
"""Runs what it is given, and returns what that returns."""

Held = dict[int, tuple[Tensor, Window | None]]
"""By storage: a tensor in it, and where that lies; None: it is the whole storage."""


@dataclass(frozen=True)
class Replayed:
    """What the step gave: the module's results (while training, the loss alone), and gradients by parameter."""

    results: tuple[Tensor, ...]
    gradients: Mapping[str, Tensor]


def replay(tape: Tape, tensors: Mapping[int, Tensor], timed: Timed = lambda run: run()) -> Replayed:
    """Run all calls in their order. `tensors`: the weights and inputs by storage, as `bound` finds them; buffers among them may change.

    A storage is given up after its last reader; `timed` gets that too, and looking the arguments up, since a step pays for both.
    Random numbers are drawn in the order of the real step, so equal seeds give equal results.
    """
    held: Held = {number: (tensor, None) for number, tensor in tensors.items()}
    kept = {window.storage for window in (*tape.results, *tape.gradients.values())}
    ends = _last_uses(tape, kept)
    with torch.set_grad_enabled(bool(tape.gradients)):  # nothing here asks for gradients, but kernels ask whether anybody does
        for number, call in enumerate(tape.calls):
            timed(lambda call=call, number=number: run_call(call, held, ends[number]))
        results = tuple(seen(held, window) for window in tape.results)
        return Replayed(results, {name: seen(held, window) for name, window in tape.gradients.items()})


def run_call(call: Call, held: Held, ends: Iterable[int] = ()) -> None:
    """Run one call on what is held, hold what it makes, and give up the storages `ends`."""
    result = call.function(*_filled(held, call.args), **{name: _filled(held, value) for name, value in call.kwargs.items()})
    leaves = (result,) if isinstance(result, Tensor) else tree_leaves(result)
    for leaf, window in zip(leaves, call.results, strict=True):
        if isinstance(leaf, Tensor) and window is not None and window.storage in call.makes and window.storage not in held:
            held[window.storage] = (leaf, window)
    for storage in ends:
        held.pop(storage, None)


def bound(tape: Tape, module: nn.Module, inputs: Any) -> dict[int, Tensor]:
    """The module's weights and the inputs, by storage. Buffers and inputs are copies, since a step may change them.

    Raises `TightfitError` for a tensor without contents.
    """
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    given = iter([leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)])
    found: dict[int, Tensor] = {}
    for number, storage in enumerate(tape.storages):
        if storage.kind == "made":
            continue
        if storage.kind == "constant":
            found[number] = tape.constants[number]
        else:
            tensor = next(given) if storage.kind == "input" else named[storage.name]
            found[number] = tensor.detach() if storage.kind == "parameter" else tensor.detach().clone()
        if found[number].device.type == "meta":
            raise TightfitError(f"`{storage.name}` has no contents", hint="a profile needs the real module and real inputs")
    device = next((tensor.device for number, tensor in found.items() if tape.storages[number].kind == "parameter"), None)
    return found if device is None else {number: tensor.to(device) for number, tensor in found.items()}


def _last_uses(tape: Tape, kept: Container[int]) -> Mapping[int, list[int]]:
    """By call, the storages that nobody needs after it; without those that are `kept`."""
    last: dict[int, int] = {}
    for number, call in enumerate(tape.calls):
        last.update(dict.fromkeys((*call.reads, *call.writes, *call.makes), number))
    ends: dict[int, list[int]] = defaultdict(list)
    for storage, number in last.items():
        if storage not in kept:
            ends[number].append(storage)
    return ends


def _filled(held: Held, value: Any) -> Any:
    """Arguments with their tensors. By hand, since torch's walk over trees takes as long as a small kernel."""
    if isinstance(value, Window):
        return seen(held, value)
    return type(value)(_filled(held, each) for each in value) if type(value) in (list, tuple) else value


def seen(held: Held, window: Window) -> Tensor:
    """The tensor that lies in `window`: the very one that a kernel gave, or a view of it."""
    tensor, born = held[window.storage]
    if window == born:
        return tensor
    tensor = laid_out(held, window.storage)
    offset = window.offset + tensor.storage_offset() - (born.offset if born else 0)  # a weight may lie inside a larger storage
    view = torch.empty(0, dtype=window.dtype, device=tensor.device)
    return view.set_(tensor.untyped_storage(), offset, window.shape, window.stride)


def laid_out(held: Held, storage: int) -> Tensor:
    """The tensor held of a storage, as recorded. A kernel may lay its result out in another way than its fake says."""
    tensor, born = held[storage]
    if born is not None and tensor.shape == born.shape and (tensor.stride() != born.stride or tensor.storage_offset() != born.offset):
        tensor = torch.empty_strided(born.shape, born.stride, dtype=born.dtype, device=tensor.device).copy_(tensor)
        held[storage] = (tensor, born)
    return tensor
