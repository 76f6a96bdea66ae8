"""Stages: the seconds that a program spends in its named parts, each without the parts inside it."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

Clock = Callable[[], float]
Part = tuple[Any, str, str]
"""An owner (module or class), the name of one of its functions, and the stage that it belongs to."""


def clock_of(device: str) -> Clock:
    """Seconds of the processor for a CPU, so that others do no harm at one thread; of the wall for a GPU, once it is done."""
    return time.thread_time if device == "cpu" else _wall_of_gpu


def _wall_of_gpu() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Stages:
    """What was spent so far. `spans`: when a stage first began and last ended."""

    clock: Clock
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    inside: list[float] = field(default_factory=list)

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, counted under `stage`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = self.clock()
            self.inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                ended = self.clock()
                self.seconds[stage] += ended - began - self.inside.pop()
                self.spans[stage] = (self.spans.get(stage, (began, began))[0], ended)
                if self.inside:
                    self.inside[-1] += ended - began

        return call

    def total(self, *names: str) -> float:
        """Of several stages."""
        return sum(self.seconds.get(name, 0.0) for name in names)


@contextmanager
def watched(parts: Sequence[Part], clock: Clock) -> Iterator[Stages]:
    """Count the seconds of `parts` while this is open."""
    stages = Stages(clock)
    with ExitStack() as stack:
        for owner, name, stage in parts:
            stack.enter_context(mock.patch.object(owner, name, stages.timed(stage, getattr(owner, name))))
        yield stages


def solver_parts() -> list[Part]:
    """The stages of every solver."""
    from tightfit.formats import affine, grids, ranges
    from tightfit.techniques import _columns

    return [
        (_columns, "settle", "factor"),
        (_columns, "factor", "factor"),
        (grids, "fit_table", "grid"),
        (ranges, "range_grid", "grid"),
        (affine, "range_grid", "grid"),
        (_columns, "_walk", "walk"),
        (_columns, "polished", "errors"),
        (_columns, "descend", "descents"),
        (grids.TableGrid, "refitted", "refits"),
        (grids.AffineGrid, "refitted", "refits"),
    ]


TURNS = ("refits", "descents", "errors")
"""Stages after the walk."""
