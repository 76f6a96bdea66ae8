"""Blocks: find the repeated layers of a model, the units that rest, stream and are recomputed."""

from collections.abc import Iterator

from torch import nn


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
    """All repeated blocks with their paths, every stack after the other. A block's place here is its *position*."""
    return [(f"{path}.{index}", block) for path, stack in block_lists(model) for index, block in enumerate(stack)]


def outside_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters that belong to no block: embeddings, final norm, head. A tied parameter comes once."""
    inside = tuple(f"{path}." for path, _ in block_lists(model))
    yield from ((name, parameter) for name, parameter in model.named_parameters() if not name.startswith(inside))


def signature(block: nn.Module) -> tuple[object, ...]:
    """What two blocks must share to be of one kind: names, shapes and dtypes of their tensors, and their attention pattern."""
    tensors = [*block.named_parameters(), *block.named_buffers()]
    patterns = [getattr(module, "sliding_window", None) for module in block.modules()]
    return (type(block).__name__, tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors), tuple(patterns))
