"""Meter: count the bytes of every living storage by kind, and keep what was alive at each phase's highest moment.

Works alike on fake and on real tensors. It does not know models: whoever runs the step names phases and kinds.
It sees what tensors hold; scratch inside a kernel is added from the table of `formats/workspace.py`.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from tightfit.formats.workspace import TOUCHED, WORKSPACE
from tightfit.terms.footprint import Footprint

_FREE = {torch.ops.prim.device.default, torch.ops.aten._unsafe_view.default}
"""Operations that touch no bytes though they are no views: a question that only fake tensors ask, and a view by another name."""


class Meter(TorchDispatchMode):
    """A dispatch mode that adds each new untyped storage once and subtracts it when it dies.

    `kind` is what storages born now are tagged with; `adopt` re-tags storages that are known to be something else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "activations"
        self.phase = "start"
        self.live: dict[str, int] = {}
        self.phases: dict[str, dict[str, int]] = {}
        self.work: dict[str, dict[str, float]] = {}
        self._known: dict[int, tuple[int, list[str]]] = {}
        self._total = 0
        self._highest: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor, self.kind)
        scratch = WORKSPACE.get(func)
        self._mark(scratch(args, kwargs) if scratch else 0)
        if not (func.is_view or func in _FREE):
            self._count_work(func, args, kwargs, result)
        return result

    def enter(self, phase: str) -> None:
        """From now on, bytes and operations belong to `phase`. A phase may be entered again."""
        self.phase = phase
        self._mark(0)

    def adopt(self, tensors: Iterable[Any], kind: str) -> None:
        """Count the storages of `tensors` under `kind`, also those that were seen before under another."""
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            self._see(tensor, kind)
            size, tag = self._known.get(tensor.untyped_storage()._cdata, (0, [kind]))
            if tag[0] != kind:
                self.live[tag[0]] -= size
                self.live[kind] = self.live.get(kind, 0) + size
                tag[0] = kind
        self._mark(0)

    def restart(self) -> None:
        """Forget the phases seen so far, not the storages that live: what follows is the steady state."""
        self.phases.clear()
        self.work.clear()
        self._highest.clear()

    def footprint(self) -> Footprint:
        """What was seen so far, phase by phase."""
        return Footprint(phases=self.phases, work=self.work)

    def _see(self, tensor: torch.Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        known = self._known.get(key)
        if known is not None:
            if known[0] != size:  # resized in place
                self._grow(known[1][0], size - known[0])
                self._known[key] = (size, known[1])
            return
        if size == 0 or tensor.device.type == "meta":
            return
        tag = [kind]
        self._known[key] = (size, tag)
        self._grow(kind, size)
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        size, tag = self._known.pop(key)
        self._grow(tag[0], -size)

    def _grow(self, kind: str, size: int) -> None:
        self.live[kind] = self.live.get(kind, 0) + size
        self._total += size

    def _mark(self, scratch: int) -> None:
        if self._total + scratch > self._highest.get(self.phase, -1):
            self._highest[self.phase] = self._total + scratch
            seen = dict(self.live)
            seen["workspace"] = seen.get("workspace", 0) + scratch
            self.phases[self.phase] = seen

    def _count_work(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        work = self.work.setdefault(self.phase, {"flops": 0.0, "bytes_touched": 0.0, "operations": 0.0})
        formula = flop_registry.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            work["flops"] += formula(*args, **kwargs, out_val=result)
        touched = TOUCHED.get(func)
        if touched is not None:
            work["bytes_touched"] += touched(args, kwargs)
        else:
            tensors = [leaf for leaf in tree_iter((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            work["bytes_touched"] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        work["operations"] += 1
