"""Alive: what the CPU allocator held at the highest moment of a run, by the operators that asked for it."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def alive_at_peak(work: Callable[[], object], shown: int = 25) -> dict[str, Any]:
    """`peak_bytes`, the operators running at the peak, and what lives there by (size, operators): the largest sums first."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = work()
    del kept
    nodes = list(record.profiler.kineto_results.experimental_event_tree()) if record.profiler else []
    events = []
    while nodes:
        node = nodes.pop()
        if node.tag.name == "Allocation":
            events.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size, node))
        nodes.extend(node.children)
    events.sort(key=lambda event: event[0])
    place = _place_of_peak(events)
    held = _held(events[: place + 1])
    groups = Counter()
    for size, path in held.values():
        groups[size, path] += 1
    largest = sorted(groups.items(), key=lambda item: -item[0][0] * item[1])[:shown]
    return {
        "peak_bytes": sum(size for size, _ in held.values()),
        "running": _path(events[place][3]),
        "groups": [{"bytes": size * count, "each": size, "count": count, "operators": path} for (size, path), count in largest],
    }


def _place_of_peak(events: list[tuple[int, int, int, Any]]) -> int:
    now = peak = place = 0
    for index, (_, _, size, _) in enumerate(events):
        now += size
        if now > peak:
            peak, place = now, index
    return place


def _held(events: list[tuple[int, int, int, Any]]) -> dict[int, tuple[int, str]]:
    held: dict[int, tuple[int, str]] = {}
    for _, pointer, size, node in events:
        if size > 0:
            held[pointer] = (size, _path(node))
        else:
            held.pop(pointer, None)
    return held


def _path(node: Any) -> str:
    names = []
    while node.parent is not None:
        node = node.parent
        names.append(node.name)
    return " > ".join(reversed(names))
