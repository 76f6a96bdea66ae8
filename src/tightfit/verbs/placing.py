"""Verbs of placing: read a graph or record a model's, name the devices, place. They only pass values from room to room."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from tightfit.data.graphs import GraphFile
from tightfit.planner.placement.load import load
from tightfit.planner.placement.place import place as place_on
from tightfit.planner.placement.simulate import simulate
from tightfit.terms.cluster import Cluster, parse_devices, parse_links
from tightfit.terms.errors import TightfitError
from tightfit.terms.machine import Machine
from tightfit.terms.placement import PlaceReport
from tightfit.terms.workload import Workload


@dataclass(frozen=True)
class Step:
    """What is placed of a model: one pass over `batch` × `tokens`, with its backward and AdamW's state while `training`."""

    batch: int = 1
    tokens: int = 512
    training: bool = False
    grain: str = "block"  # block, module or operator; a device map needs whole blocks


def read_cluster(
    devices: str, memory_bytes: int | None = None, links: Iterable[str] = (), latency_seconds: float = 0.0, serial: bool = False
) -> Cluster:
    """Devices and links as people write them (`4x8GiB`, `0-1=50GB/s`). Raises `TightfitError` for what is neither."""
    found = parse_devices(devices, memory_bytes)
    link, pairs = parse_links(links, len(found), latency_seconds)
    return Cluster(found, link, pairs, serial)


def place(source: GraphFile, cluster: Cluster, objective: str = "makespan", seconds: float = 10.0) -> PlaceReport:
    """Place the operators of a graph, and simulate the step. `seconds`: how long to look for a better answer at most.

    Raises `DoesNotFit` where no placement can stay inside the devices' memory, or none was found.
    """
    placed = place_on(source.graph, cluster, objective, seconds)
    schedule = simulate(source.graph, cluster, placed.placement)
    return PlaceReport(source.graph, source.ids, cluster, placed, schedule, load(source.graph, cluster, placed.placement.device_of))


def recorded(model: str, step: Step) -> GraphFile:
    """A step of a model, recorded on paper and priced with this machine's GPU rates.

    Raises `TightfitError` for a model that cannot be recorded.
    """
    return _source(_captured(model, step), model)


def place_model(model: str, cluster: Cluster, step: Step, objective: str = "makespan", seconds: float = 10.0) -> PlaceReport:
    """Record a step of a model and place it; with a device map for the grain `block`. Raises as `recorded` and `place`."""
    from tightfit.planner.placement.device_map import device_map

    captured = _captured(model, step)
    report = place(_source(captured, model), cluster, objective, seconds)
    whole = step.grain == "block"
    return replace(report, device_map=device_map(captured, report.placed.placement.device_of) if whole else None)


@dataclass(frozen=True)
class InPaper:
    """What one of Baechi's algorithms finds: seconds of the simulated step (-1: nothing that fits), of finding it, fused operators."""

    seconds: float
    place_seconds: float
    operators: int


def place_as_in_paper(source: GraphFile, cluster: Cluster, algorithm: str) -> InPaper:
    """What `m-TOPO`, `m-ETF` or `m-SCT` finds for the graph as the paper makes it smaller."""
    from tightfit.planner.placement.paper import as_in_paper

    began = time.perf_counter()
    found, operators = as_in_paper(source.graph, cluster, algorithm)
    taken = time.perf_counter() - began
    return InPaper(simulate(source.graph, cluster, found).makespan if found else -1.0, taken, operators)


def _captured(model: str, step: Step) -> Any:
    from tightfit.describe.source import describe
    from tightfit.rehearse.capture import capture
    from tightfit.rehearse.fake import inputs_for

    task = "tune" if step.training else "embed"
    module = describe(model, task, fetch=False).meta_model()
    return capture(module, inputs_for(module, Workload(task, step.batch, step.tokens)), step.training, step.grain)


def _source(captured: Any, name: str) -> GraphFile:
    from tightfit.rehearse.costs import priced

    graph = replace(priced(captured, Machine.here(), "gpu"), name=name)
    return GraphFile(graph, tuple(operator.name for operator in graph.operators))


def default_devices(source: GraphFile | None, devices: str | None) -> str:
    """What was asked for, or as many as the graph's file names. Raises `TightfitError` where neither says."""
    if devices:
        return devices
    if source is None or source.devices is None:
        raise TightfitError("on which devices?", hint="add `--devices 4x8GiB`")
    return str(source.devices)
