"""Layered: random graphs in layers, as large as asked, and how long the heuristics take to place them."""

import random
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tightfit.planner.placement.simulate import simulate
from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.graph import Graph, Operator

Row = dict[str, Any]


def layered_graph(operators: int, width: int, seed: int) -> Graph:
    """Layers of `width`; each operator reads one to three of the layer before, and one in ten also one of the 8 layers before."""
    chance = random.Random(seed)
    nodes, edges = [], set()
    for at in range(operators):
        seconds, size = chance.uniform(0.1, 2.0) * 1e-3, chance.randrange(1, 1 << 24)
        nodes.append(Operator(f"operator {at}", seconds, weight_bytes=size, output_bytes=chance.randrange(1, 1 << 22)))
        layer = at // width
        if layer:
            before = range((layer - 1) * width, layer * width)
            edges |= {(source, at) for source in chance.sample(before, min(len(before), chance.randint(1, 3)))}
            if chance.random() < 0.1:
                edges.add((chance.randrange(max(0, layer - 8) * width, layer * width), at))
    return Graph(f"layered {operators}", tuple(nodes), tuple(sorted(edges)))


def speed_row(settings: Mapping[str, Any], heuristic: str, operators: int) -> Row:
    """One heuristic on one graph, on devices that hold one and a half times what all need."""
    part = settings["speed"]
    graph = layered_graph(operators, part["width"], part["seed"])
    need = sum(operator.weight_bytes for operator in graph.operators) + 256 * (1 << 22)
    devices = tuple(Device(f"device {number}", int(1.5 * need / part["devices"])) for number in range(part["devices"]))
    cluster = Cluster(devices, Link(settings["pipedream_link"]))
    place = vars(import_module(f"tightfit.planner.placement.{heuristic}"))[heuristic]
    began = time.perf_counter()
    placement = place(graph, cluster)
    seconds = time.perf_counter() - began
    row = {"operators": operators, "edges": len(graph.edges), "devices": part["devices"], "seconds": seconds}
    row["operators_per_second"] = operators / seconds
    if placement is None:
        return row | {"fault": "no placement that fits"}
    schedule = simulate(graph, cluster, placement)
    return row | {
        "makespan_over_work": schedule.makespan / (graph.seconds / part["devices"]),
        "peak_over_limit": max(peak / device.memory_bytes for peak, device in zip(schedule.peak_bytes, devices, strict=True)),
    }
