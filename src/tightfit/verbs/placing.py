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
from tightfit.terms.errors import DoesNotFit, TightfitError, near
from tightfit.terms.machine import Machine
from tightfit.terms.placement import PlaceReport
from tightfit.terms.units import show_bytes
from tightfit.terms.workload import Workload

OBJECTIVES = ("makespan", "throughput")


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
    if objective not in OBJECTIVES:
        raise TightfitError(f"no objective is called `{objective}`", hint=near(objective, OBJECTIVES))
    placed = place_on(source.graph, cluster, objective, seconds)
    schedule = simulate(source.graph, cluster, placed.placement)
    return PlaceReport(source.graph, source.ids, cluster, placed, schedule, load(source.graph, cluster, placed.placement.device_of))


def recorded(model: str, step: Step) -> GraphFile:
    """A step of a model, recorded on paper and priced with this machine's GPU rates.

    Raises `TightfitError` for a model that cannot be recorded.
    """
    return _source(_captured(model, step, tied=True), model)


def place_model(
    model: str, cluster: Cluster, step: Step, objective: str = "makespan", seconds: float = 10.0, tied: bool | None = None
) -> PlaceReport:
    """Record a step of a model and place it, beside what each GPU keeps for itself; with a device map for the grain `block`.

    `tied`: whether tied weights share a device, as a device map needs it. By default they do, but for `throughput`: there the first and
    the last stage may have one each. Raises as `recorded` and `place`.
    """
    from tightfit.planner.placement.device_map import block_devices, device_map

    machine = Machine.here()
    captured = _captured(model, step, objective != "throughput" if tied is None else tied)
    notes, left = _notes(machine), _beside(cluster, machine)
    try:
        report = place(_source(captured, model), left, objective, seconds)
    except DoesNotFit as error:
        raise DoesNotFit(str(error), hint=f"{error.hint}; {notes[0]}") from error
    device_of = report.placed.placement.device_of
    if step.grain != "block":
        return replace(report, notes=notes)
    homes = block_devices(captured, device_of)
    return replace(report, device_map=device_map(captured, device_of), block_devices=homes, notes=notes)


def _beside(cluster: Cluster, machine: Machine) -> Cluster:
    """What tensors may take of each GPU."""
    rooms = [int((device.memory_bytes - machine.overhead_gpu) / (1 + machine.allocator_slack)) for device in cluster.devices]
    if min(rooms) <= 0:
        needed, least = show_bytes(machine.overhead_gpu), show_bytes(min(device.memory_bytes for device in cluster.devices))
        raise DoesNotFit(f"a GPU needs {needed} for itself, and one has {least}", hint="name larger devices")
    return replace(cluster, devices=tuple(replace(d, memory_bytes=room) for d, room in zip(cluster.devices, rooms, strict=True)))


def _notes(machine: Machine) -> tuple[str, ...]:
    kept = f"{show_bytes(machine.overhead_gpu)} of each device are left to CUDA, and {machine.allocator_slack:.0%} to its allocator"
    if machine.device != "cpu":
        return (kept,)
    rates = f"{machine.gpu_flops / 1e12:.0f} TFLOP/s and {machine.gpu_bandwidth / 1e9:.0f} GB/s"
    return kept, f"times are those of a GPU of {rates}, which is a guess: `tightfit probe` measures one"


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


def _captured(model: str, step: Step, tied: bool) -> Any:
    from tightfit.describe.source import describe
    from tightfit.rehearse.capture import capture
    from tightfit.rehearse.fake import inputs_for

    task = "tune" if step.training else "embed"
    module = describe(model, task, fetch=False).meta_model()
    inputs = inputs_for(module, Workload(task, step.batch, step.tokens))
    whole = getattr(module, "_no_split_modules", None) if step.grain == "block" else None
    return capture(module, inputs, step.training, step.grain, whole or (), tied=tied)


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
