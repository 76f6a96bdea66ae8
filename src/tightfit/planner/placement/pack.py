"""Pack: give every group a device by what it leaves there for good, before anything is scheduled. For where memory is barely enough.

It does not know times; what runs when, and whether outputs on their way fit too, is for the schedulers and `simulate`.
"""

from collections.abc import Iterable, Iterator, Sequence

from tightfit.planner.placement.cuts import cheapest_cuts
from tightfit.planner.placement.memory import bytes_at_peak, lasting_bytes
from tightfit.planner.placement.orders import depth_first, group_of, upward_ranks, urgent_first
from tightfit.planner.placement.simulate import fits, simulate
from tightfit.planner.placement.times import times
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placement

SHARES = (1.0, 0.97, 0.94, 0.9, 0.85, 0.8, 0.7, 0.6)  # of each device's memory, for what is there at the peak: the rest is for copies
_LEAST_PACKINGS = 3
_OPERATORS_SCHEDULED = 50_000  # about a second for each way to schedule a packing
_HALVINGS = 20  # of the fill that is searched for: to a millionth
_EXACT_GROUPS = 400  # the integer program is asked for no more groups
_EXACT_SECONDS = 10.0


def first_that_fits(graph: Graph, cluster: Cluster, attempts: Iterable[Placement | None]) -> Placement | None:
    """The first of `attempts` whose simulated step stays inside every device's memory."""
    return next((found for found in attempts if found is not None and fits(cluster, simulate(graph, cluster, found))), None)


def packings(graph: Graph, cluster: Cluster) -> Iterator[list[int]]:
    """Devices by operator, so that what lasts fits: few and cheap cuts first, then even fill, then whatever is found; without repeats.

    Larger graphs get fewer, for each is scheduled.
    """
    seen = set()
    for homes in _homes(graph, cluster):
        if homes is not None and tuple(homes) not in seen:
            seen.add(tuple(homes))
            yield by_operator(graph, homes)
            if len(seen) >= max(_LEAST_PACKINGS, _OPERATORS_SCHEDULED // len(graph.operators)):
                return


def by_operator(graph: Graph, homes: Sequence[int]) -> list[int]:
    """The device of each operator from that of each of `graph.groups`."""
    device_of = [0] * len(graph.operators)
    for home, members in zip(homes, graph.groups, strict=True):
        for at in members:
            device_of[at] = home
    return device_of


def line_of(graph: Graph, order: Sequence[int]) -> list[int]:
    """Groups by the first of their operators in `order`."""
    number = group_of(graph)
    return list(dict.fromkeys(number[at] for at in order))


def group_bytes(graph: Graph, sizes: Sequence[int] | None = None) -> list[int]:
    """What each of `graph.groups` leaves on its device to the end of the step, or its sum of `sizes` by operator."""
    sizes = lasting_bytes(graph) if sizes is None else sizes
    return [sum(sizes[at] for at in members) for members in graph.groups]


def _homes(graph: Graph, cluster: Cluster) -> Iterator[list[int] | None]:
    """By what lasts, and by what is there at the peak: while training, outputs that wait for the backward weigh more than weights do."""
    lasts, rooms, costs = group_bytes(graph), [device.memory_bytes for device in cluster.devices], times(graph, cluster)
    orders = (graph.order, depth_first(graph), urgent_first(graph, upward_ranks(graph, costs)))
    lines = [(line_of(graph, order), _at_peak(graph, order, lasts)) for order in orders]
    found = False
    for line, _ in lines:
        for homes in (filled(lasts, rooms, line), even(lasts, rooms, line), cheapest_cuts(graph, costs, line, lasts, rooms)):
            found |= homes is not None
            yield homes
    for share in SHARES:
        for line, at_peak in lines:
            yield cheapest_cuts(graph, costs, line, at_peak, [room * share for room in rooms])
    for line, at_peak in lines:
        yield even(at_peak, rooms, line)
        for sizes in (lasts, at_peak):
            largest_first = sorted(line, key=sizes.__getitem__, reverse=True)
            for homes in (_emptiest(sizes, rooms, largest_first), _tightest(sizes, rooms, largest_first)):
                found |= homes is not None
                yield homes
    if not found and len(lasts) <= _EXACT_GROUPS:
        yield _exact(lasts, rooms)


def _at_peak(graph: Graph, order: Sequence[int], lasts: Sequence[int]) -> list[int]:
    return [max(sizes) for sizes in zip(lasts, group_bytes(graph, bytes_at_peak(graph, order)), strict=True)]


def filled(sizes: Sequence[int], rooms: Sequence[float], line: Sequence[int]) -> list[int] | None:
    """One device after the other, each as full as it gets; None if groups of `line` remain."""
    homes, device, room = [0] * len(sizes), 0, rooms[0]
    for group in line:
        while sizes[group] > room:
            device += 1
            if device == len(rooms):
                return None
            room = rooms[device]
        homes[group] = device
        room -= sizes[group]
    return homes


def even(sizes: Sequence[int], rooms: Sequence[float], line: Sequence[int]) -> list[int] | None:
    """One device after the other, all as evenly full as the order of `line` allows."""
    found, low, high = filled(sizes, rooms, line), 0.0, 1.0
    for _ in range(_HALVINGS if found else 0):
        middle = (low + high) / 2
        homes = filled(sizes, [room * middle for room in rooms], line)
        if homes is None:
            low = middle
        else:
            found, high = homes, middle
    return found


def _emptiest(sizes: Sequence[int], rooms: Sequence[int], line: Sequence[int]) -> list[int] | None:
    """Each group to the device that is the least full with it."""
    used, homes = [0] * len(rooms), [0] * len(sizes)
    for group in line:
        could = [device for device, room in enumerate(rooms) if used[device] + sizes[group] <= room]
        if not could:
            return None
        homes[group] = min(could, key=lambda device: (used[device] + sizes[group]) / max(1, rooms[device]))
        used[homes[group]] += sizes[group]
    return homes


def _tightest(sizes: Sequence[int], rooms: Sequence[int], line: Sequence[int]) -> list[int] | None:
    """Each group to the device that it leaves the least room on: best fit decreasing."""
    left, homes = list(rooms), [0] * len(sizes)
    for group in line:
        could = [device for device, room in enumerate(left) if sizes[group] <= room]
        if not could:
            return None
        homes[group] = min(could, key=lambda device: left[device])
        left[homes[group]] -= sizes[group]
    return homes


def _exact(sizes: Sequence[int], rooms: Sequence[int]) -> list[int] | None:
    """By integer program: some packing if there is one, within seconds; the groups that weigh nothing go to the first device."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    heavy, count = [group for group, size in enumerate(sizes) if size], len(rooms)
    if not heavy:
        return [0] * len(sizes)
    across = np.arange(len(heavy) * count)  # group by group, its devices
    once = coo_array((np.ones(len(across)), (across // count, across)))
    scale = max(rooms) or 1
    weigh = coo_array((np.repeat([sizes[group] / scale for group in heavy], count), (across % count, across)))
    within = LinearConstraint(weigh.tocsr(), -np.inf, np.array(rooms) / scale)  # type: ignore[arg-type]
    found = milp(
        np.zeros(len(across)),
        constraints=[LinearConstraint(once.tocsr(), 1, 1), within],
        integrality=np.ones(len(across)),
        bounds=Bounds(0, 1),
        options={"time_limit": _EXACT_SECONDS},
    )
    if found.x is None:
        return None
    homes = [0] * len(sizes)
    for group, device in zip(heavy, found.x.reshape(len(heavy), count).argmax(1), strict=True):
        homes[group] = int(device)
    return homes
