"""Placing: small graphs and clusters for the tests of placement, random ones, and every placement of a tiny graph."""

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

from hypothesis import strategies as st

from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.graph import Graph, Operator
from tightfit.terms.placement import Placement


def draw_graph(random: random.Random, most: int, groups: bool = True, sizes: bool = True, whole: bool = True) -> Graph:
    """A graph of 1 to `most` operators; times are whole numbers, so that sums do not depend on their order."""
    count = random.randint(1, most)
    size = (lambda most: random.randint(0, most)) if sizes else (lambda most: 0)
    seconds = (lambda: float(random.randint(0, 6))) if whole else random.random
    density = random.choice((0.1, 0.3, 0.6))
    operators = tuple(
        Operator(
            name=f"o{at}",
            seconds=seconds(),
            weight_bytes=size(8),
            kept_bytes=size(3),
            temporary_bytes=size(4),
            output_bytes=size(5),
            transfer_seconds=float(random.randint(0, 4)) if random.random() < 0.2 else None,
            group=random.choice(("", "", "", "a", "b")) if groups else "",
        )
        for at in range(count)
    )
    names = list(range(count))
    random.shuffle(names)  # numbers say nothing of the order
    edges = tuple((names[source], names[target]) for source, target in itertools.combinations(range(count), 2) if random.random() < density)
    return Graph("random", operators, edges)


def draw_cluster(random: random.Random, graph: Graph, alike: bool = False, serial: bool | None = None) -> Cluster:
    """Up to three devices, from ample to hardly enough memory; speeds and links are powers of two, so that times stay exact."""
    count = random.randint(1, 3)
    needs = sum(one.weight_bytes + one.kept_bytes + one.output_bytes + one.temporary_bytes for one in graph.operators)
    rooms = [max(1, int(needs * random.choice((0.3, 0.5, 0.7, 1.0, 2.0))) + random.randint(0, 5)) for _ in range(count)]
    devices = tuple(Device(f"d{at}", room, 1.0 if alike else random.choice((0.5, 1.0, 2.0))) for at, room in enumerate(rooms))
    link = Link(random.choice((0.5, 1.0, 4.0)), float(random.randint(0, 2)))
    other = {} if alike or random.random() < 0.5 or count < 2 else {(0, 1): Link(2.0, 1.0)}
    return Cluster(devices, link, other, random.random() < 0.5 if serial is None else serial)


def seeds() -> st.SearchStrategy[random.Random]:
    """What random graphs are drawn with; a failing one is told by its seed."""
    return st.randoms(use_true_random=False)


def topological_orders(graph: Graph) -> Iterator[tuple[int, ...]]:
    """Every order in which each operator stands after what it reads."""

    def extend(order: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(order) == len(graph.operators):
            yield order
        for at in range(len(graph.operators)):
            if at not in order and all(parent in order for parent in graph.parents[at]):
                yield from extend((*order, at))

    return extend(())


def assignments(graph: Graph, cluster: Cluster) -> Iterator[tuple[int, ...]]:
    """Every way to give each group a device."""
    for homes in itertools.product(range(len(cluster.devices)), repeat=len(graph.groups)):
        device_of = [0] * len(graph.operators)
        for home, members in zip(homes, graph.groups, strict=True):
            for at in members:
                device_of[at] = home
        yield tuple(device_of)


def all_placements(graph: Graph, cluster: Cluster) -> Iterator[Placement]:
    """Every placement: each assignment with each order, without orders that are the same on each device."""
    orders = list(topological_orders(graph))
    for device_of in assignments(graph, cluster):
        seen = set()
        for order in orders:
            lines = tuple(tuple(at for at in order if device_of[at] == device) for device in range(len(cluster.devices)))
            if lines not in seen:
                seen.add(lines)
                yield Placement(device_of, order, "all")


def is_sound(graph: Graph, cluster: Cluster, placement: Placement) -> bool:
    """Each operator once and after what it reads, on a device that is there, and groups together."""
    place = {at: number for number, at in enumerate(placement.order)}
    return (
        sorted(placement.order) == list(range(len(graph.operators)))
        and all(place[source] < place[target] for source, target in graph.edges)
        and all(0 <= device < len(cluster.devices) for device in placement.device_of)
        and all(len({placement.device_of[at] for at in members}) == 1 for members in graph.groups)
    )


def real_graphs() -> Path:
    """Where the real graphs lie: `graphs` in what `TIGHTFIT_DATA` names, or in `shared/data` beside the checkout. It need not exist."""
    return Path(os.environ.get("TIGHTFIT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data") / "graphs"
