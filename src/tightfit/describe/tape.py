"""Tape: one recorded step of a model, operation by operation, with the storages that its tensors lie in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """A tensor as a place in a storage. Views of one tensor differ only here, so they cost nothing and are no operators."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Storage:
    """Memory that tensors lie in. `name` is that of the parameter, buffer or input; what an operator made has none."""

    kind: str  # parameter, buffer, input, constant, made
    size_bytes: int
    name: str = ""
    gradient_bytes: int = 0  # of a trained parameter
    elements: int = 0
    aliases: tuple[str, ...] = ()  # the other names of a tied parameter


@dataclass(frozen=True)
class Visit:
    """One run through the forward of one module."""

    path: str
    kind: str  # its class
    leaf: bool
    block: bool  # one of the model's repeated blocks
    outer: int | None


@dataclass(frozen=True)
class Call:
    """One operation of the step. `args` and `kwargs` are its own, with a `Window` in the place of each tensor."""

    function: Any
    args: Any
    kwargs: Any
    results: tuple[Window | None, ...]
    reads: tuple[int, ...]  # storages
    writes: tuple[int, ...]  # storages that were there before
    makes: tuple[int, ...]
    visit: int | None
    backward: bool = False
    forward: int | None = None  # the call whose gradient a backward one computes
    flops: float = 0.0
    touched_bytes: int = 0
    workspace_bytes: int = 0  # inside the kernel, beside its results


@dataclass(frozen=True)
class Tape:
    """One step, call by call, in the order in which it ran."""

    name: str
    calls: tuple[Call, ...]
    storages: tuple[Storage, ...]
    visits: tuple[Visit, ...]
    results: tuple[Window, ...]
    gradients: Mapping[str, Window] = field(default_factory=dict)
    constants: Mapping[int, Tensor] = field(default_factory=dict)
    freed: Mapping[int, int] = field(default_factory=dict)  # by storage: how many calls had run when Python gave it up

    def visits_of(self, call: Call) -> list[int]:
        """The modules that `call` ran in, from the outermost on."""
        chain = []
        visit = call.visit
        while visit is not None:
            chain.append(visit)
            visit = self.visits[visit].outer
        return chain[::-1]
