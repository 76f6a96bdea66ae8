"""Bounds: what no placement can beat, in seconds and in bytes. They hold for every placement that `simulate` finds to fit."""

from collections.abc import Iterator, Sequence

from tightfit.planner.placement.earliest import earliest_starts, latest_tails
from tightfit.planner.placement.moments import moments
from tightfit.planner.placement.orders import group_of, heads, tails
from tightfit.planner.placement.paths import least_cut_seconds, parts
from tightfit.planner.placement.times import Times, times
from tightfit.terms.cluster import Cluster
from tightfit.terms.errors import DoesNotFit
from tightfit.terms.graph import Graph
from tightfit.terms.units import show_bytes

_THRESHOLDS = 64  # of heads and of tails that the work bound looks at: each pair holds, more pairs are only sharper
_ROUNDING = 1e-12  # sums of the same times in another order may differ by so much, and a bound must not be above what it bounds


def bound(graph: Graph, cluster: Cluster) -> tuple[float, str]:
    """Seconds that no placement is below, and what that rests on."""
    by = max(found := lower_bounds(graph, cluster), key=lambda name: found[name])
    return found[by], by


def lower_bounds(graph: Graph, cluster: Cluster) -> dict[str, float]:
    """Lower bounds on the makespan in seconds, by what they rest on; the plain ones come first.

    `critical path`: the longest path of work, at the fastest device's speed, with no transfers. `largest operator`: of a group, all on one
    device. `work`: what lies between the longest paths before and after it, spread over all devices (Fernandez and Bussell 1973).
    `transfers`: the same, where an operator's inputs are either computed on its own device, one after the other, or sent to it
    (Papadimitriou and Yannakakis 1990). `memory`: what does not fit on one device must send something.
    """
    costs = times(graph, cluster)
    run = costs.fastest_run
    before, after = heads(graph, run), tails(graph, run)
    power = sum(device.speed for device in cluster.devices)
    found = {
        "critical path": max(map(sum, zip(before, run, after, strict=True))),
        "largest operator": max(_together(graph, run, before, after)),
        "work": _work(graph, power, before, after),
    }
    if len(cluster.devices) > 1:
        room = max(device.memory_bytes for device in cluster.devices)
        found["memory"] = max(
            max(_must_send(graph, costs, before, after, sizes, room), least_cut_seconds(graph, costs, sizes, room))
            for sizes in moments(graph)
        )
        sent_before, sent_after = earliest_starts(graph, costs), latest_tails(graph, costs)
        found["transfers"] = max(
            max(map(sum, zip(sent_before, run, sent_after, strict=True))),
            max(_together(graph, run, sent_before, sent_after)),
            _work(graph, power, sent_before, sent_after),
            _one_device_or_send(graph, costs, before, after),
        )
    return {name: seconds * (1 - _ROUNDING) for name, seconds in found.items()}


def least_memory(graph: Graph, cluster: Cluster) -> None:
    """Nothing, where bytes alone do not exclude that some placement fits; that none is excluded does not say that there is one.

    Raises `DoesNotFit`, with what is needed and what is there: for all groups over all devices, and for the largest of them and the
    hungriest operator on the largest device.
    """
    rooms = [device.memory_bytes for device in cluster.devices]
    largest = max(cluster.devices, key=lambda device: device.memory_bytes)
    every = moments(graph)
    whole = max(map(sum, every))
    if whole > sum(rooms):
        raise DoesNotFit(
            f"`{graph.name}` needs {show_bytes(whole)} at one time on its devices, and they have {show_bytes(sum(rooms))} together",
            hint=f"{show_bytes(whole - sum(rooms))} more are needed at least: more devices, or larger ones",
        )
    sizes = [max(at_once) for at_once in zip(*every, strict=True)]
    group = max(range(len(sizes)), key=sizes.__getitem__)
    needed = [(sizes[group], _called(graph, graph.groups[group])), *_running(graph)]
    size, name = max(needed, key=lambda need: need[0])
    if size > largest.memory_bytes:
        raise DoesNotFit(
            f"{name} of `{graph.name}` needs {show_bytes(size)} on one device, and the largest, `{largest.name}`, "
            f"has {show_bytes(largest.memory_bytes)}",
            hint=f"{show_bytes(size - largest.memory_bytes)} more are needed there at least, or smaller operators",
        )


def _called(graph: Graph, members: Sequence[int]) -> str:
    first = graph.operators[members[0]]
    return f"the group `{first.group}`" if len(members) > 1 else f"the operator `{first.name}`"


def _running(graph: Graph) -> Iterator[tuple[int, str]]:
    """What each operator needs while it runs: its group's weights, what is kept, its inputs, its output and what is temporary."""
    group, operators = group_of(graph), graph.operators
    weights = [sum(operators[at].weight_bytes for at in members) for members in graph.groups]
    for at, one in enumerate(operators):
        if one.seconds:  # what takes no time holds nothing at any time
            inputs = sum(operators[parent].output_bytes for parent in graph.parents[at])
            yield weights[group[at]] + inputs + one.kept_bytes + one.temporary_bytes + one.output_bytes, f"the operator `{one.name}`"


def _together(graph: Graph, run: Sequence[float], before: Sequence[float], after: Sequence[float]) -> Iterator[float]:
    """The operators of a group run one after the other."""
    for members in graph.groups:
        yield min(before[at] for at in members) + sum(run[at] for at in members) + min(after[at] for at in members)


def _work(graph: Graph, power: float, before: Sequence[float], after: Sequence[float]) -> float:
    """The largest of: nothing of a set starts before `a`, `b` remains after each of it, and all devices together do its work between."""
    import numpy as np

    first, last = (np.array(sorted(set(values))) for values in (before, after))
    first, last = (values[np.linspace(0, len(values) - 1, min(_THRESHOLDS, len(values))).astype(int)] for values in (first, last))
    rows, columns = np.searchsorted(first, before, "right") - 1, np.searchsorted(last, after, "right") - 1
    work = np.zeros((len(first), len(last)))
    np.add.at(work, (rows, columns), [operator.seconds for operator in graph.operators])
    beyond = work[::-1, ::-1].cumsum(0).cumsum(1)[::-1, ::-1]  # of all operators at or past both thresholds
    return float(np.where(beyond > 0, first[:, None] + last[None, :] + beyond / power, 0.0).max())


def _through(graph: Graph, costs: Times, before: Sequence[float], after: Sequence[float], members: set[int]) -> float:
    """The least makespan when any edge among `members`, but inside no group, crosses between devices."""
    run, send = costs.fastest_run, costs.fastest_send
    operators = graph.operators
    return min(
        (
            before[at] + run[at] + send[at] + run[child] + after[child]
            for at in members
            for child in graph.children[at]
            if not operators[at].group or operators[at].group != operators[child].group
        ),
        default=float("inf"),
    )


def _must_send(graph: Graph, costs: Times, before: Sequence[float], after: Sequence[float], sizes: Sequence[int], room: int) -> float:
    """What hangs together and is more at one moment than the largest device holds is cut somewhere; `sizes` by group."""
    group = group_of(graph)
    cut = [members for members in parts(graph) if sum(sizes[number] for number in {group[at] for at in members}) > room]
    return max((seconds for members in cut if (seconds := _through(graph, costs, before, after, members)) < float("inf")), default=0.0)


def _one_device_or_send(graph: Graph, costs: Times, before: Sequence[float], after: Sequence[float]) -> float:
    """What hangs together runs one after the other on one device, or is cut somewhere."""
    run = costs.fastest_run
    return max(min(sum(run[at] for at in members), _through(graph, costs, before, after, members)) for members in parts(graph))
