"""Load: what a sample takes on each device of a pipeline, the memory a device needs for it, and the order in which data flows.

It does not know how many samples are under way: what a forward keeps for its backward counts once.
"""

from collections.abc import Sequence

from tightfit.planner.placement.orders import places, topological
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph


def load(graph: Graph, cluster: Cluster, device_of: Sequence[int]) -> tuple[float, ...]:
    """Seconds per sample of each device; the largest is the time per sample of the pipeline.

    A device's operators over its speed, and each output it reads from another device once, and each of its outputs that others read once;
    with unlike links an output is sent over the slowest that it takes. Forward and backward count together. Source: Tarnawski et al.,
    NeurIPS 2020, section 3 (max-load); the `expert` mode of their code.
    """
    loads = [0.0] * len(cluster.devices)
    for at, operator in enumerate(graph.operators):
        home = device_of[at]
        loads[home] += operator.seconds / cluster.devices[home].speed
        sent = 0.0
        for device in sorted({device_of[child] for child in graph.children[at]} - {home}):
            seconds = cluster.link_between(home, device).seconds(operator)
            loads[device] += seconds
            sent = max(sent, seconds)
        loads[home] += sent
    return tuple(loads)


def held_bytes(graph: Graph, cluster: Cluster, device_of: Sequence[int]) -> tuple[int, ...]:
    """The most that each device holds while one sample goes through it, its operators run in `pipeline_order`.

    Weights, what is kept so far, the temporary memory of the operator that runs, outputs from other devices until their last reader here,
    own outputs until their last reader here; those that are sent, or that nobody reads, to the end. Nothing is assumed about when
    transfers end, so no timing of one sample can hold more.
    """
    return _peaks(graph, device_of, len(cluster.devices))


def alone_bytes(graph: Graph) -> tuple[int, ...]:
    """What each of `graph.groups` holds at most on a device of its own."""
    group_of = {at: number for number, members in enumerate(graph.groups) for at in members}
    return _peaks(graph, [group_of[at] for at in range(len(graph.operators))], len(graph.groups))


def _peaks(graph: Graph, device_of: Sequence[int], devices: int) -> tuple[int, ...]:
    own: list[list[int]] = [[] for _ in range(devices)]
    for at in _forward_first(graph):
        own[device_of[at]].append(at)
    return tuple(_peak(graph, members) for members in own)


def _peak(graph: Graph, members: Sequence[int]) -> int:
    """The peak of a device that runs `members` in this order."""
    here, last = set(members), dict[int, int]()
    for number, at in enumerate(members):
        last.update(dict.fromkeys(graph.parents[at], number))
    change = [0] * (len(members) + 1)  # in what is held, before the operator at this place runs
    held = sum(graph.operators[at].weight_bytes for at in members)
    for number, at in enumerate(members):
        operator, children = graph.operators[at], graph.children[at]
        change[number] += operator.kept_bytes + operator.output_bytes
        if children and here.issuperset(children):
            change[last[at] + 1] -= operator.output_bytes
    for writer in last.keys() - here:
        held += graph.operators[writer].output_bytes
        change[last[writer] + 1] -= graph.operators[writer].output_bytes
    peak = 0
    for number, at in enumerate(members):
        held += change[number]
        peak = max(peak, held + graph.operators[at].temporary_bytes)
    return peak


def flow(graph: Graph) -> tuple[tuple[int, int], ...]:
    """The edges that a pipeline's stages follow: the forward's, the backward's turned round, and none of those between both.

    Some files let the backward's edges run as the forward's do; those stay as they are.
    """
    turned = _turned(graph)
    found = {}
    for source, target in graph.edges:
        if graph.operators[source].backward == graph.operators[target].backward:
            found[(target, source) if graph.operators[source].backward and turned else (source, target)] = None
    return tuple(found)


def _turned(graph: Graph) -> bool:
    """Whether the backward runs against the forward: no more of its edges lead between groups as the forward's do than the other way."""
    groups = [operator.group for operator in graph.operators]
    ends = [(source, target, (groups[source], groups[target])) for source, target in graph.edges if groups[source] and groups[target]]
    ahead = {pair for source, target, pair in ends if not (graph.operators[source].backward or graph.operators[target].backward)}
    back = [pair for source, target, pair in ends if graph.operators[source].backward and graph.operators[target].backward]
    return sum(pair in ahead for pair in back) <= sum(pair[::-1] in ahead for pair in back)


def stages(graph: Graph, device_of: Sequence[int]) -> tuple[int, ...] | None:
    """The devices in use, in the order in which the forward's data flows through them; None where it flows in a circle.

    A split with such an order is contiguous: each device runs its part of the forward at one go, and its part of the backward.
    """
    used = sorted(set(device_of))
    arrows = {(device_of[source], device_of[target]) for source, target in flow(graph)}
    waits = {device: sum(target == device and source != device for source, target in arrows) for device in used}
    ready = [device for device in used if not waits[device]]
    for device in ready:
        for source, target in sorted(arrows):
            if source == device and target != device:
                waits[target] -= 1
                if not waits[target]:
                    ready.append(target)
    return tuple(ready) if len(ready) == len(used) else None


def pipeline_order(graph: Graph, device_of: Sequence[int]) -> tuple[int, ...]:
    """A topological order that runs the forward stage by stage, then the backward, in the other direction, where data flows one way.

    Each device runs its operators in the same order as for any other split: forward first, each in the graph's order.
    """
    order = _forward_first(graph)
    found = stages(graph, device_of)
    if found is None:
        return order
    place, turn, back = places(order), {device: number for number, device in enumerate(found)}, -1 if _turned(graph) else 1

    def rank(at: int) -> tuple[int, int, int]:
        step = _step(graph, at)
        return step, turn[device_of[at]] * (back if step else 1), place[at]

    staged = tuple(sorted(order, key=rank))
    after = places(staged)
    return staged if all(after[source] < after[target] for source, target in graph.edges) else order


def _forward_first(graph: Graph) -> tuple[int, ...]:
    """A topological order with the backward as late as it can be, else as the graph has it."""
    place = places(graph.order)
    return topological(graph, lambda at: (_step(graph, at), place[at]))


def _step(graph: Graph, at: int) -> int:
    return int(graph.operators[at].backward)
