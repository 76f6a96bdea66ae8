"""Pipelines: random graphs, training ones too, and independent references for loads, flow, and the best of all splits."""

import math
from itertools import product

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from tightfit.planner.placement.load import held_bytes
from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.graph import Graph, Operator

LINK = Link(bytes_per_second=1.0)
quick = settings(deadline=None, max_examples=60)


def cluster_of(*memory: int, speeds: tuple[float, ...] = (), link: Link = LINK) -> Cluster:
    speeds = speeds or (1.0,) * len(memory)
    return Cluster(tuple(Device(f"d{number}", size, speed) for number, (size, speed) in enumerate(zip(memory, speeds, strict=True))), link)


@st.composite
def graphs(draw: st.DrawFn, most: int = 6, training: bool | None = None, outputs: bool = True) -> Graph:
    """A random graph; a training one has a backward for most operators, in the group of its forward, and reads turned round."""
    count = draw(st.integers(1, most))
    training = draw(st.booleans()) if training is None else training
    small = st.integers(0, 4)
    shared = st.sampled_from(["", "", "", "a", "b"])
    operators, edges = [], []
    for at in range(count):
        group = f"layer {at}" if training else draw(shared)
        sizes = (
            draw(small),
            0 if training else draw(small),
            draw(small) if outputs else 0,
            draw(small) if outputs else 0,
        )  # weights, kept, …
        seconds, sent = draw(small), draw(st.one_of(st.none(), small))
        operators.append(Operator(f"f{at}", float(seconds), *sizes, None if sent is None else float(sent), group))
        edges += [(before, at) for before in range(at) if draw(st.integers(0, 2)) == 0]
    if training:
        alone = draw(st.integers(-1, count - 1))  # a backward that may go anywhere
        for at in range(count):
            out = draw(small) if outputs else 0
            group = f"layer {at}" if at != alone else ""
            operators.append(Operator(f"b{at}", float(draw(small)), output_bytes=out, group=group, backward=True))
        edges += [(target + count, source + count) for source, target in edges] + [(at, at + count) for at in range(count)]
    return Graph("random", tuple(operators), tuple(edges))


@st.composite
def clusters(draw: st.DrawFn, most: int = 3) -> Cluster:
    count = draw(st.integers(1, most))
    memory = [draw(st.sampled_from([6, 12, 40, 400])) for _ in range(count)]
    return cluster_of(*memory, speeds=tuple(draw(st.sampled_from([1.0, 1.0, 2.0])) for _ in range(count)))


def all_splits(graph: Graph, cluster: Cluster) -> list[tuple[int, ...]]:
    """Every way to give each group a device."""
    found = []
    for chosen in product(range(len(cluster.devices)), repeat=len(graph.groups)):
        device_of = {at: device for members, device in zip(graph.groups, chosen, strict=True) for at in members}
        found.append(tuple(device_of[at] for at in range(len(graph.operators))))
    return found


def flows_one_way(graph: Graph, device_of: tuple[int, ...], turned: bool = True) -> bool:
    """No device of the forward, nor of the backward (`turned` round), can be reached from itself through another."""
    count = max(device_of) + 1
    reach = np.zeros((count, count), dtype=bool)
    for source, target in graph.edges:
        one, other = graph.operators[source].backward, graph.operators[target].backward
        if one == other and device_of[source] != device_of[target]:
            reach[(device_of[target], device_of[source]) if one and turned else (device_of[source], device_of[target])] = True
    for _ in range(count):
        reach = reach | (reach.astype(int) @ reach.astype(int) > 0)
    return not reach.diagonal().any()


def plain_load(graph: Graph, cluster: Cluster, device_of: tuple[int, ...]) -> list[float]:
    """The README of dnn-partitioning, sentence by sentence, for alike links."""
    found = []
    for device, runs in enumerate(cluster.devices):
        own = [at for at, home in enumerate(device_of) if home == device]
        received = {source for source, target in graph.edges if device_of[target] == device and device_of[source] != device}
        sent = {source for source, target in graph.edges if device_of[source] == device and device_of[target] != device}
        moved = sum(cluster.link.seconds(graph.operators[at]) for at in [*received, *sent])
        found.append(sum(graph.operators[at].seconds for at in own) / runs.speed + moved)
    return found


def fits(graph: Graph, cluster: Cluster, device_of: tuple[int, ...]) -> bool:
    return all(held <= device.memory_bytes for held, device in zip(held_bytes(graph, cluster, device_of), cluster.devices, strict=True))


def least(graph: Graph, cluster: Cluster, one_way: bool) -> float:
    """The least largest load of all splits that fit; infinite where none does."""
    splits = (split for split in all_splits(graph, cluster) if fits(graph, cluster, split))
    return min((max(plain_load(graph, cluster, split)) for split in splits if not one_way or flows_one_way(graph, split)), default=math.inf)
