"""Witness: the CPU allocator's own records of a run, loading and running told apart, and who holds what at the highest moment.

It knows nothing of the meter that the promise was made with.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

RUN = "tightfit: the run begins"


@dataclass(frozen=True)
class Event:
    """Bytes taken (positive) or given back at `pointer`."""

    nanoseconds: int
    pointer: int
    size: int
    node: Any


def mark_run() -> None:
    """What comes from now on is the run, no longer the loading."""
    with record_function(RUN):
        pass


def witness(work: Callable[[], object], shown: int = 0) -> dict[str, Any]:
    """`load_peak_bytes` and `measured_peak_bytes` (after `mark_run`), beyond what was allocated before `work`.

    With `shown`, also what lives at both peaks by size and operators, the largest sums first.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = work()  # until the records are closed, so that nothing is freed twice
    del kept
    events, began = _events(record)
    now, peaks, places = 0, {"load": 0, "run": 0}, {"load": 0, "run": 0}
    for index, event in enumerate(events):
        now += event.size
        part = "load" if event.nanoseconds < began else "run"
        if now > peaks[part]:
            peaks[part], places[part] = now, index
    found = {"measured_load_bytes": peaks["load"], "measured_peak_bytes": peaks["run"]}
    return found | ({"alive": {part: _alive(events, place, shown) for part, place in places.items()}} if shown else {})


def _events(record: Any) -> tuple[list[Event], int]:
    """All events in order of time, and when the run began."""
    nodes, events, began = list(record.profiler.kineto_results.experimental_event_tree()), [], 0
    while nodes:
        node = nodes.pop()
        if node.tag.name == "Allocation":
            events.append(Event(node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size, node))
        elif node.name == RUN:
            began = node.start_time_ns
        nodes.extend(node.children)
    return sorted(events, key=lambda event: event.nanoseconds), began


def _alive(events: list[Event], place: int, shown: int) -> dict[str, Any]:
    held: dict[int, tuple[int, str]] = {}
    for event in events[: place + 1]:
        if event.size > 0:
            held[event.pointer] = (event.size, _path(event.node))
        else:
            held.pop(event.pointer, None)
    largest = sorted(Counter(held.values()).items(), key=lambda item: -item[0][0] * item[1])[:shown]
    groups = [{"bytes": size * count, "each": size, "count": count, "operators": path} for (size, path), count in largest]
    return {"running": _path(events[place].node), "groups": groups}


def _path(node: Any) -> str:
    names = []
    while node.parent is not None:
        node = node.parent
        names.append(node.name)
    return " > ".join(reversed(names))
