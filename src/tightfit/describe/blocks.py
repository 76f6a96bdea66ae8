"""Blocks: find the repeated layers of a model, the units that rest, stream and are recomputed."""

from collections.abc import Iterator
from functools import partial

from torch import nn

from tightfit.contracts import Absorbs, Beside

_PATTERNS = ("sliding_window", "layer_type")
"""Attributes by which transformers' modules tell what a block attends to."""


def block_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The model's stacks of repeated blocks with their paths, outermost only, in module order.

    A stack is a `ModuleList` of modules that have children of their own. An encoder–decoder model has two; the experts
    inside a block are not a stack, since their list lies inside one.
    """
    found: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer, _ in found):
            continue
        if isinstance(module, nn.ModuleList) and len(module) and all(next(child.children(), None) for child in module):
            found.append((path, module))
    return found


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's own repeated blocks with their paths, every stack after the other. A block's place here is its *position*."""
    beside = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Beside))
    own = [(path, stack) for path, stack in block_lists(model) if not path.startswith(beside)]
    return [(f"{path}.{index}", block) for path, stack in own for index, block in enumerate(stack)]


def names_in_files(block: nn.Module) -> list[str]:
    """Names of what a checkpoint holds of `block`: its parameters, and what belongs to weights that lie there in few bits."""
    kept = [f"{path}.{name}" for path, module in block.named_modules() if isinstance(module, Absorbs) for name in module._buffers]
    return [*(name for name, _ in block.named_parameters()), *kept]


def adapted_name(model: nn.Module, name: str) -> str:
    """Where the parameter that a checkpoint calls `name` lies in a model whose layers adapters wrap: PEFT's keep theirs as `base_layer`."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    while "base_layer" in module._modules:
        parent, module = f"{parent}.base_layer", module.base_layer
    return f"{parent}.{leaf}" if parent else leaf


def outside_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters that belong to no block: embeddings, final norm, head. A tied parameter comes once."""
    inside = tuple(f"{path}." for path, _ in block_lists(model))
    yield from ((name, parameter) for name, parameter in model.named_parameters() if not name.startswith(inside))


def signature(block: nn.Module) -> tuple[object, ...]:
    """What two blocks must share to be of one kind.

    Names, shapes and dtypes of their tensors; classes, switches and attention pattern of their modules; what their forward runs under.
    """
    tensors = [*block.named_parameters(), *block.named_buffers()]
    modules = tuple((type(module).__name__, *_switches(module)) for module in block.modules())
    return tuple((name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad) for name, tensor in tensors), modules, _wrapping(block)


def _switches(module: nn.Module) -> Iterator[tuple[str, object]]:
    return ((name, value) for name, value in vars(module).items() if isinstance(value, bool) or name in _PATTERNS)


def _wrapping(block: nn.Module) -> tuple[str, ...]:
    """The functions that run the block's forward, outermost first. A technique leaves `partial(function, …, forward)` in its place."""
    names, forward = [], vars(block).get("forward")
    while isinstance(forward, partial):
        names.append(f"{forward.func.__module__}.{forward.func.__qualname__}")
        forward = forward.args[-1]
    return tuple(names)
