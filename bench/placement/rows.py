"""Rows: one graph on one cluster: what is found, how far it is from a bound and from the optimum, and what simpler ways give."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sources import Source
from splits import Split, fits, others

from tightfit.planner.placement.atoms import group_atoms, stage_atoms
from tightfit.planner.placement.exact import exact
from tightfit.planner.placement.load import alone_bytes, load, pipeline_order
from tightfit.planner.placement.load_program import load_program
from tightfit.planner.placement.place import place
from tightfit.planner.placement.simulate import fits as inside
from tightfit.planner.placement.simulate import simulate
from tightfit.planner.placement.starts import BAECHI
from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.errors import TightfitError
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placed, Placement

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A graph and the devices that it is to be placed on."""

    source: Source
    cluster: Cluster
    memory_factor: float  # each device's memory over `least_bytes`; 0 where the file says the memory


def least_bytes(graph: Graph, devices: int) -> int:
    """What each device must hold about: an equal share of what is there at once (weights, what is kept, outputs that wait for the
    backward), or the group that holds the most by itself; for one device, all that there ever is.
    """
    atoms = group_atoms(graph, Cluster((Device("any", 1),), Link(1.0)))
    return atoms.all_bytes if devices == 1 else max(-(-sum(atoms.held_bytes) // devices), *alone_bytes(graph))


def throughput_row(settings: Mapping[str, Any], case: Case) -> Row:
    """The largest load of the split that is found, beside those of others."""
    graph, cluster = case.source.graph, case.cluster
    row, placed = _placed(settings, case, "throughput")
    if placed is None:
        return row
    splits = others(graph, cluster) | case.source.splits(cluster)
    row["others"] = {name: _largest(graph, cluster, split) for name, split in splits.items()}
    row["over_others"] = {name: placed.seconds / value for name, value in row["others"].items() if value}
    row["scattered_seconds"] = placed.tried.get("scattered")
    if placed.bound_by == "optimum":
        row["exact_seconds"] = placed.bound_seconds
    elif placed.placement.by in ("contiguous", "one device"):
        row |= _exact_load(settings, case, placed)
    if "exact_seconds" in row:
        row["over_exact"] = placed.seconds / row["exact_seconds"]
    return row


def _exact_load(settings: Mapping[str, Any], case: Case, placed: Placed) -> Row:
    """The integer program over contiguous splits, where it is small; only a proof counts."""
    atoms, cluster = stage_atoms(case.source.graph, case.cluster), case.cluster
    if (len(atoms.members) + 2 * len(atoms.outputs)) * len(cluster.devices) > settings["exact_variables"]:
        return {}
    solved = load_program(atoms, cluster, settings["exact_seconds"], placed.seconds * 1.000001, range(len(cluster.devices)))
    row: Row = {"program_bound_seconds": min(solved.bound_seconds, placed.seconds)}
    if solved.device_of:
        split = atoms.spread(solved.device_of)
        value = max(load(case.source.graph, cluster, split))
        row |= {"exact_seconds": value} if value <= solved.bound_seconds * 1.0001 and fits(case.source.graph, cluster, split) else {}
    return row


def makespan_row(settings: Mapping[str, Any], case: Case) -> Row:
    """The makespan of the placement that is found, beside those of others as the simulator gives them."""
    graph, cluster = case.source.graph, case.cluster
    row, placed = _placed(settings, case, "makespan")
    if placed is None:
        return row
    splits = others(graph, cluster) | case.source.splits(cluster)
    row["others"], row["overfull"] = dict.fromkeys(splits), []
    for name, split in splits.items():
        if split is not None:
            schedule = simulate(graph, cluster, Placement(split, pipeline_order(graph, split), name))
            if inside(cluster, schedule):
                row["others"][name] = schedule.makespan
            else:
                row["overfull"].append(name)
    row["over_others"] = {name: placed.seconds / value for name, value in row["others"].items() if value}
    heuristics = [placed.tried[name] for name in BAECHI if placed.tried.get(name)]
    row["best_heuristic_seconds"] = min(heuristics, default=None)
    if placed.gap <= 1e-9:
        row["exact_seconds"] = placed.seconds
    elif len(graph.operators) <= settings["exact_operators"]:
        found = exact(graph, cluster, placed.placement, settings["exact_seconds"])
        row["program_bound_seconds"] = found.bound_seconds
        row |= {"exact_seconds": found.seconds} if found.proven else {}
    if "exact_seconds" in row:
        row["over_exact"] = placed.seconds / row["exact_seconds"]
    return row


def _placed(settings: Mapping[str, Any], case: Case, objective: str) -> tuple[Row, Placed | None]:
    """What both objectives tell of an answer."""
    graph, cluster = case.source.graph, case.cluster
    about = {"operators": len(graph.operators), "devices": len(cluster.devices), "memory_bytes": cluster.devices[0].memory_bytes}
    try:
        placed = place(graph, cluster, objective, settings["place_seconds"])
    except TightfitError as error:
        return about | {"fault": str(error)}, None
    schedule = simulate(graph, cluster, placed.placement)
    memory = [device.memory_bytes for device in cluster.devices]
    return about | {
        "seconds": placed.seconds,
        "bound_seconds": placed.bound_seconds,
        "bound_by": placed.bound_by,
        "gap": placed.gap,
        "by": placed.placement.by,
        "tried": dict(placed.tried),
        "peak_over_limit": max(peak / size for peak, size in zip(placed.peak_bytes, memory, strict=True)),
        "simulated_over_limit": max(peak / size for peak, size in zip(schedule.peak_bytes, memory, strict=True)),
        "place_seconds": placed.place_seconds,
    }, placed


def _largest(graph: Graph, cluster: Cluster, split: Split) -> float | None:
    return max(load(graph, cluster, split)) if split and fits(graph, cluster, split) else None
