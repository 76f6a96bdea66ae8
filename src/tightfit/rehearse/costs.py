"""Costs: the seconds of each operator of a captured graph, from a machine's rates, or measured by running the operators one by one."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tightfit.describe.graph import Captured
from tightfit.describe.tape import Call
from tightfit.rehearse.clock import compute_seconds
from tightfit.rehearse.replay import bound, replay
from tightfit.terms.errors import TightfitError
from tightfit.terms.graph import Graph
from tightfit.terms.machine import Machine


def priced(captured: Captured, machine: Machine, tier: str) -> Graph:
    """The graph with seconds by `machine`'s rates: for each call the larger of products and bytes, plus the fixed time of an operation."""
    seconds = [sum(call_seconds(captured.tape.calls[call], machine, tier) for call in calls) for calls in captured.parts]
    return _with_seconds(captured.graph, seconds)


def call_seconds(call: Call, machine: Machine, tier: str) -> float:
    """One call on `tier` (`ram` or `gpu`), by the rule of `clock.py`."""
    return compute_seconds({"flops": call.flops, "bytes_touched": call.touched_bytes, "operations": 1}, tier, machine)


def profile(captured: Captured, module: nn.Module, inputs: Any, repeats: int = 5) -> Graph:
    """The graph with measured seconds: the median of `repeats` runs, after one that is not counted, of each operator on its real tensors.

    `module` and `inputs` must be real and on the device that was captured for. On a GPU an operator's time goes from its launch to
    its end on the stream, so that gaps in which the GPU waits for Python count, as they do in a real step.
    Raises `TightfitError` for tensors without contents.
    """
    taken = profile_calls(captured, module, inputs, repeats)
    return _with_seconds(captured.graph, [sum(taken[call] for call in calls) for calls in captured.parts])


def profile_calls(captured: Captured, module: nn.Module, inputs: Any, repeats: int = 5) -> list[float]:
    """Seconds of each call, measured as `profile` does."""
    if repeats < 1:
        raise TightfitError(f"{repeats} repeats measure nothing", hint="ask for one or more")
    runs = []
    for _ in range(repeats + 1):
        tensors = bound(captured.tape, module, inputs)
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        mark, between, settle = _stopwatch(device)
        marks: list[tuple[Any, Any]] = []

        def timed(run: Callable[[], Any], mark: Callable[[], Any] = mark, marks: list[tuple[Any, Any]] = marks) -> Any:
            begin = mark()
            result = run()
            marks.append((begin, mark()))
            return result

        replay(captured.tape, tensors, timed)
        settle()
        runs.append([between(begin, end) for begin, end in marks])
    return [statistics.median(times) for times in zip(*runs[1:], strict=True)]


def _stopwatch(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float], Callable[[], None]]:
    """How to mark a moment, the seconds between two, and what to wait for before asking."""
    if device.type != "cuda":
        return time.perf_counter, lambda begin, end: end - begin, lambda: None

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return mark, lambda begin, end: begin.elapsed_time(end) / 1e3, lambda: torch.cuda.synchronize(device)


def _with_seconds(graph: Graph, seconds: list[float]) -> Graph:
    return replace(graph, operators=tuple(replace(one, seconds=took) for one, took in zip(graph.operators, seconds, strict=True)))
