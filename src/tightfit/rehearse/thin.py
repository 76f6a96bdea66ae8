"""Thin: which few blocks of a deep model are rehearsed, since the others only repeat them. It knows kinds, not bytes.

The first and the last block of every kind are *landmarks*: one of them holds the peak, whatever stands between. What the other
blocks add to a landmark depends on their kind, and on the landmarks that they stand between.
"""

import copy
from bisect import bisect
from collections.abc import Collection, Hashable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import nn

from tightfit.describe.blocks import block_lists

FEW = 2
"""Blocks of a group that are rehearsed one by one."""
_PLAIN = (bool, int, float, str, NoneType, torch.dtype, torch.device)


def landmarks(kinds: Sequence[Hashable]) -> list[int]:
    """The places of the first and of the last block of every kind.

    >>> landmarks("dddsdddsddds")
    [0, 3, 10, 11]
    """
    first = {kind: place for place, kind in reversed(list(enumerate(kinds)))}
    last = {kind: place for place, kind in enumerate(kinds)}
    return sorted({*first.values(), *last.values()})


def repeats(kinds: Sequence[Hashable]) -> list[list[int]]:
    """The places of all other blocks, in groups of one kind that stand between the same landmarks.

    >>> repeats("dddsdddsddds")
    [[1, 2], [4, 5, 6, 8, 9], [7]]
    """
    marks = landmarks(kinds)
    groups: dict[tuple[Hashable, int], list[int]] = {}
    for place, kind in enumerate(kinds):
        if place not in marks:
            groups.setdefault((kind, bisect(marks, place)), []).append(place)
    return list(groups.values())


def plan_of(kinds: Sequence[Sequence[Hashable]]) -> tuple[list[set[int]], list[tuple[int, list[set[int]]]]]:
    """What to rehearse of several stacks: the places of the base, and for each further rehearsal a number and its places.

    A further rehearsal has one more block of every group of that number of blocks: their shares need not be told apart.
    Few blocks of a group are no more work than a further rehearsal, so they are in the base.

    >>> plan_of(["aaaaaa", "dddsdddsddds"])
    ([{0, 5}, {0, 1, 2, 3, 7, 10, 11}], [(4, [{0, 1, 5}, {0, 1, 2, 3, 7, 10, 11}]), (5, [{0, 5}, {0, 1, 2, 3, 4, 7, 10, 11}])])
    """
    groups = [repeats(stack) for stack in kinds]
    base = [
        {*landmarks(stack), *(place for group in found if len(group) <= FEW for place in group)}
        for stack, found in zip(kinds, groups, strict=True)
    ]
    sizes = sorted({len(group) for found in groups for group in found if len(group) > FEW})
    return base, [
        (size, [places | {group[0] for group in found if len(group) == size} for places, found in zip(base, groups, strict=True)])
        for size in sizes
    ]


def names_of(kinds: Sequence[Hashable]) -> list[str]:
    """How a stack's blocks are called in the phases: landmarks by name, all others together.

    >>> names_of("aaa")
    ['first block', 'blocks', 'last block']
    >>> names_of("ab")
    ['first block of kind 1', 'first block of kind 2']
    """
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds), 1)}
    names = ["blocks"] * len(kinds)
    for kind, number in numbers.items():
        places = [place for place, other in enumerate(kinds) if other == kind]
        of_kind = f" of kind {number}" if len(numbers) > 1 else ""
        names[places[-1]] = f"last block{of_kind}"
        names[places[0]] = f"first block{of_kind}"
    return names


def thinned(model: nn.Module, kept: Sequence[Collection[int]]) -> nn.Module:
    """A copy of the meta `model` with only the blocks at the places `kept` of each stack. The other blocks are never copied.

    Tensors are shared, since those on `meta` have nothing to write to, and so are configs, which a forward pass only reads.
    """
    memo: dict[int, Any] = {}
    stacks = block_lists(model)
    for (_, stack), places in zip(stacks, kept, strict=True):
        memo[id(stack)] = nn.ModuleList(_copied(stack[place], memo) for place in sorted(places))
    thin = _copied(model, memo)
    for (path, stack), places in zip(stacks, kept, strict=True):
        owner = thin.get_submodule(path.rpartition(".")[0])
        if "config" in vars(owner):
            owner.config = _in_step(owner.config, len(stack), sorted(places))
    return thin


def _copied(module: nn.Module, memo: dict[int, Any]) -> Any:
    """As `copy.deepcopy`, several times as fast: a mixture of experts has thousands of modules, each with a dozen empty dicts of hooks."""
    if id(module) in memo:
        return memo[id(module)]
    new = memo[id(module)] = module.__class__.__new__(module.__class__)
    for name, value in vars(module).items():
        if name == "_modules":
            value = {child: None if part is None else _copied(part, memo) for child, part in value.items()}
        elif name in ("_parameters", "_buffers") or (isinstance(value, (dict, set, list)) and not value):
            value = value.copy()
        elif name != "config" and not isinstance(value, _PLAIN):
            value = copy.deepcopy(value, memo)
        vars(new)[name] = value
    return new


def _in_step(config: Any, depth: int, places: Sequence[int]) -> Any:
    """A copy of `config` in which lists of one entry per block (`layer_types`, …) have those of the blocks at `places`.

    A stack's loop looks them up by place. The blocks keep the full config and their own number, by which the cache knows them.
    """
    cut = copy.copy(config)
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == depth:
            vars(cut)[name] = [value[place] for place in places]
    return cut
