"""Splits that others make: a human expert's, accelerate's, PipeDream's over a chain, balanced by time, filled greedily, one device."""

import json
import logging
from pathlib import Path

import networks
from torch import nn

from tightfit.data.graphs import GraphFile
from tightfit.describe.graph import Captured
from tightfit.planner.placement.atoms import Atoms, stage_atoms
from tightfit.planner.placement.ideals import closures, linear_orders, prefixes
from tightfit.planner.placement.load import held_bytes
from tightfit.planner.placement.splitting import best_split, kinds_of
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph

Split = tuple[int, ...] | None
FOREVER = float("inf")


def expert_split(file: Path, read: GraphFile) -> Split:
    """The human expert's split of dnn-partitioning; a training graph without one takes that of its inference."""
    folder = file.parents[2] / "human-experts"
    kinds = [file.stem, file.stem.replace("training", "inference")] if file.parent.name == "LayerGraphs" else []
    found = next((path for path in (folder / f"{kind}_expert.json" for kind in kinds) if path.exists()), None)
    if found is None:
        return None
    stages = json.loads(found.read_text())["fpgas"]
    device_of = {str(node): number for number, stage in enumerate(stages) for node in stage["nodes"]}
    group_of = {operator.group: device_of[name] for name, operator in zip(read.ids, read.graph.operators, strict=True) if name in device_of}
    return tuple(
        device_of.get(name, group_of.get(operator.group, 0)) for name, operator in zip(read.ids, read.graph.operators, strict=True)
    )


def accelerate_split(module: nn.Module, captured: Captured, cluster: Cluster) -> Split:
    """accelerate's `infer_auto_device_map`, which counts weights alone; an operator runs where the module is that it ran in.

    None where accelerate sends a part to RAM or disk.
    """
    from accelerate import infer_auto_device_map

    logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)  # that these GPUs are not here
    whole = list(getattr(module, "_no_split_modules", None) or networks.WHOLE)
    rooms: dict[int | str, int | str] = {number: device.memory_bytes for number, device in enumerate(cluster.devices)}
    homes = infer_auto_device_map(module, rooms | {"cpu": 1 << 62}, whole)
    if not all(isinstance(home, int) for home in homes.values()):
        return None
    tape, device_of = captured.tape, list[int]()
    for calls in captured.parts:
        call = tape.calls[calls[0]] if calls else None
        call = tape.calls[call.forward] if call is not None and call.forward is not None else call
        paths = [tape.visits[visit].path for visit in tape.visits_of(call)] if call is not None else []
        device_of.append(next((int(homes[path]) for path in reversed(paths) if path in homes), int(homes.get("", 0))))
    for members in captured.graph.groups:
        for member in members:
            device_of[member] = device_of[members[0]]
    return tuple(device_of)


def others(graph: Graph, cluster: Cluster) -> dict[str, Split]:
    """The splits of simpler ways, None where they do not fit."""
    atoms = stage_atoms(graph, cluster)
    order = linear_orders(atoms, shuffles=0)[0]
    found = {
        "one device": (0,) * len(graph.operators),
        "greedy fill": _filled(atoms, cluster, order),
        "balanced": _balanced(atoms, cluster, order),
        "linear order": _along(atoms, cluster, prefixes(order)),
        "pipedream chain": _along(atoms, cluster, _chain(atoms)),
    }
    return {name: split if split is not None and fits(graph, cluster, split) else None for name, split in found.items()}


def fits(graph: Graph, cluster: Cluster, split: tuple[int, ...]) -> bool:
    """Whether no device holds more than it can."""
    return all(held <= device.memory_bytes for held, device in zip(held_bytes(graph, cluster, split), cluster.devices, strict=True))


def _along(atoms: Atoms, cluster: Cluster, ideals: list[int]) -> Split:
    """PipeDream's dynamic program over a line of cuts (Narayanan et al., SOSP 2019, section 3.1), without copies of a stage."""
    kinds = kinds_of(cluster)
    ceiling = 10 * (sum(atoms.seconds) + sum(output.seconds for output in atoms.outputs)) + 1
    split = best_split(atoms, ideals, kinds, ceiling, FOREVER) or best_split(atoms, ideals, kinds, ceiling, FOREVER, crowded=True)
    if split is None:
        return None
    left = [list(kind.devices) for kind in kinds]
    device_of = [0] * len(atoms.members)
    for stage in split.stages:
        device = left[stage.kind].pop(0)
        for atom in range(len(device_of)):
            if (stage.after & ~stage.before) >> atom & 1:
                device_of[atom] = device
    return atoms.spread(device_of)


def _chain(atoms: Atoms) -> list[int]:
    """The cuts of the chain that is left when every branching is contracted: around atoms that all others stand before or behind."""
    behind, ahead = closures(atoms)
    count = len(atoms.members)
    on_chain = [atom for atom in range(count) if (behind[atom] | ahead[atom]).bit_count() == count]
    cuts = {0, (1 << count) - 1, *(behind[atom] for atom in on_chain), *(behind[atom] ^ 1 << atom for atom in on_chain)}
    return sorted(cuts, key=int.bit_count)


def _balanced(atoms: Atoms, cluster: Cluster, order: tuple[int, ...]) -> Split:
    """Equal shares of the work along the order, memory or not."""
    total, passed, device_of = sum(atoms.seconds) or 1.0, 0.0, [0] * len(order)
    for atom in order:
        device_of[atom] = min(len(cluster.devices) - 1, int((passed + atoms.seconds[atom] / 2) / total * len(cluster.devices)))
        passed += atoms.seconds[atom]
    return atoms.spread(device_of)


def _filled(atoms: Atoms, cluster: Cluster, order: tuple[int, ...]) -> Split:
    """Each device until the next atom is too much for it, as accelerate's `infer_auto_device_map` does."""
    device, used, device_of = 0, 0, [0] * len(order)
    for atom in order:
        need = atoms.held_bytes[atom] + atoms.inside_bytes[atom]
        while device < len(cluster.devices) and used + need > cluster.devices[device].memory_bytes:
            device, used = device + 1, 0
        if device == len(cluster.devices):
            return None
        used += need
        device_of[atom] = device
    return atoms.spread(device_of)
