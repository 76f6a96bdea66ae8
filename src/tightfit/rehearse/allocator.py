"""Allocator: the CPU allocator's own records of what it gave and took, to hold the meter and the rehearsal against.

It knows nothing of tensors or kinds, so it is an independent witness; it costs time and memory, so only tests and benchmarks use it.
"""

import gc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocator_peak(work: Callable[[], object]) -> int:
    """Bytes at the highest moment of `work`, beyond what was allocated before it."""
    gc.collect()  # the profiler remembers earlier records: cycles left by them, freed during `work`, would count against it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = work()  # until the records are closed, so that nothing is freed twice
    del kept
    events: list[tuple[int, int]] = []
    nodes = list(record.profiler.kineto_results.experimental_event_tree()) if record.profiler else []
    while nodes:
        node = nodes.pop()
        if node.tag.name == "Allocation":
            events.append((node.start_time_ns, node.extra_fields.alloc_size))
        nodes.extend(node.children)
    now = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        now += size
        peak = max(peak, now)
    return peak
