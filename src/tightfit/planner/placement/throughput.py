"""Throughput: a split of a graph into the stages of a pipeline, whose time per sample is the largest load of a device."""

import time
from dataclasses import replace

from tightfit.planner.placement.atoms import Atoms, group_atoms, stage_atoms
from tightfit.planner.placement.contiguous import Contiguous, contiguous
from tightfit.planner.placement.load import held_bytes, load, pipeline_order
from tightfit.planner.placement.load_bounds import load_bound, refuse_too_small
from tightfit.planner.placement.load_program import load_program
from tightfit.planner.placement.memory import inside
from tightfit.planner.placement.rebalance import pack, rebalance, repair
from tightfit.terms.cluster import Cluster
from tightfit.terms.errors import DoesNotFit
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placed, Placement
from tightfit.terms.units import show_bytes

_MOST_VARIABLES = 3000  # that the integer program is tried with
_MORE_MEMORY = (1.1, 1.25, 1.6)  # times what there is, for splits that are then made to fit
_CLOSE = 1.002  # times the bound: nothing is left to gain

Split = tuple[int, ...]
"""The device of each operator."""


def throughput(graph: Graph, cluster: Cluster, seconds_limit: float = 20.0, scattered: bool = False, seed: int = 0) -> Placed:
    """The split with the least largest load that was found, and a bound on the least there is.

    Contiguous, so that each device runs its part of the forward and of the backward at one go, and so is the bound; where no contiguous
    one was found that fits, or with `scattered`, any split and a bound on any. `tried` holds both. Memory is `held_bytes`: one sample at a
    time on a device. Takes about `seconds_limit` seconds. Raises `DoesNotFit` where no split was found. Source: Tarnawski et al.,
    NeurIPS 2020.
    """
    began = time.perf_counter()
    deadline = began + seconds_limit
    pieces, whole = group_atoms(graph, cluster), stage_atoms(graph, cluster)
    refuse_too_small(pieces, cluster)
    found = contiguous(graph, cluster, seconds_limit * 0.6, seed=seed)
    splits: dict[str, Split | None] = {"one device": _one_device(graph, cluster), "contiguous": found.device_of if found else None}
    bound = _contiguous_bound(whole, cluster, found, deadline)
    free = scattered or found is None
    left = deadline - time.perf_counter()
    splits["scattered"] = _scattered(graph, cluster, splits, left * 0.6 if free else min(left, 0.1 * seconds_limit), seed)
    if free:
        bound = _scattered_bound(pieces, cluster, graph, splits, deadline)
    tried = {name: max(load(graph, cluster, split)) if split else None for name, split in splits.items()}
    wanted = [name for name in tried if tried[name] is not None and (free or name != "scattered")]
    if not wanted:
        raise _none_found(pieces, cluster)
    best = min(wanted, key=lambda name: tried[name] or 0.0)
    device_of, seconds = splits[best] or (), tried[best] or 0.0
    placement = Placement(device_of, pipeline_order(graph, device_of), best)
    held = held_bytes(graph, cluster, device_of)
    return Placed("throughput", seconds, min(bound[0], seconds), bound[1], placement, held, tried, time.perf_counter() - began)


def _one_device(graph: Graph, cluster: Cluster) -> Split | None:
    """All on the fastest device that holds it."""
    fitting = []
    for number, device in enumerate(cluster.devices):
        split = (number,) * len(graph.operators)
        if held_bytes(graph, cluster, split)[number] <= device.memory_bytes:
            fitting.append((-device.speed, number))
    return (min(fitting)[1],) * len(graph.operators) if fitting else None


def _scattered(graph: Graph, cluster: Cluster, splits: dict[str, Split | None], seconds_limit: float, seed: int) -> Split | None:
    """The best that a local search makes of the best split so far; where none fits, of contiguous ones for more memory, made to fit."""
    fitting = [split for split in splits.values() if split]
    until = time.perf_counter() + seconds_limit / 2
    if not fitting:
        packed = [pack(graph, cluster)]
        packed += [_made_to_fit(graph, cluster, more, seconds_limit / 10, seed) for more in _MORE_MEMORY if time.perf_counter() < until]
        fitting = [rebalance(graph, cluster, split, seconds_limit / 10, seed) for split in packed if split]
    if not fitting:
        return None
    start = min(fitting, key=lambda split: max(load(graph, cluster, split)))
    return rebalance(graph, cluster, start, max(0.05, seconds_limit / (1 if any(splits.values()) else 2)), seed)


def _made_to_fit(graph: Graph, cluster: Cluster, more: float, seconds_limit: float, seed: int) -> Split | None:
    """A contiguous split for so many times the memory, repaired."""
    larger = tuple(replace(device, memory_bytes=int(device.memory_bytes * more)) for device in cluster.devices)
    found = contiguous(graph, replace(cluster, devices=larger), seconds_limit, seed=seed)
    return repair(graph, cluster, found.device_of, seconds_limit) if found else None


def _contiguous_bound(atoms: Atoms, cluster: Cluster, found: Contiguous | None, deadline: float) -> tuple[float, str]:
    """What no contiguous split is below."""
    if found and found.optimal:
        return found.seconds, "optimum"
    bound = max(load_bound(atoms, cluster), (found.bound_seconds if found else 0.0, "optimum of ample memory"))
    alike = len({(device.memory_bytes, device.speed) for device in cluster.devices}) == 1
    if found is None or not alike or cluster.links or found.seconds <= bound[0] * _CLOSE or _variables(atoms, cluster) > _MOST_VARIABLES:
        return bound
    order = range(len(cluster.devices))
    solved = load_program(atoms, cluster, max(1.0, deadline - time.perf_counter()) * 0.5, found.seconds * 1.000001, order)
    return max(bound, (min(solved.bound_seconds, found.seconds), "integer program"))


def _scattered_bound(atoms: Atoms, cluster: Cluster, graph: Graph, splits: dict[str, Split | None], deadline: float) -> tuple[float, str]:
    """What no split at all is below. What the integer program finds joins `splits` where it fits."""
    bound, left = load_bound(atoms, cluster), deadline - time.perf_counter()
    values = [max(load(graph, cluster, split)) for split in splits.values() if split]
    close = bool(values) and min(values) <= bound[0] * _CLOSE
    if cluster.links or close or left < 1 or _variables(atoms, cluster) > _MOST_VARIABLES:
        return bound
    solved = load_program(atoms, cluster, left, min(values, default=float("inf")) * 1.000001)
    if solved.device_of:
        split = atoms.spread(solved.device_of)
        if inside(cluster, held_bytes(graph, cluster, split)):
            splits["integer program"] = split
    return max(bound, (solved.bound_seconds, "integer program")) if solved.bound_seconds < float("inf") else bound


def _variables(atoms: Atoms, cluster: Cluster) -> int:
    return (len(atoms.members) + 2 * len(atoms.outputs)) * len(cluster.devices)


def _none_found(atoms: Atoms, cluster: Cluster) -> DoesNotFit:
    need, have = sum(atoms.held_bytes), sum(device.memory_bytes for device in cluster.devices)
    return DoesNotFit(
        f"found no split that fits: the graph holds {show_bytes(need)} and outputs besides, the devices {show_bytes(have)}",
        hint="give the devices more memory, or take more of them",
    )
