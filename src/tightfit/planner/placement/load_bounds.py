"""Load bounds: how small the largest load of a pipeline can be at best, and what can fit on no devices at all."""

from collections.abc import Sequence

from tightfit.planner.placement.atoms import Atoms
from tightfit.terms.cluster import Cluster
from tightfit.terms.errors import DoesNotFit
from tightfit.terms.units import enough, show_bytes


def load_bound(atoms: Atoms, cluster: Cluster) -> tuple[float, str]:
    """Seconds that the largest load of no split is below, and what that rests on: `work`, `largest operator`, or `memory`.

    `atoms` are the pieces of the splits that are meant: of any, or of contiguous ones. Sending is left out.
    """
    found = [(_work(atoms, cluster), "work"), (_largest(atoms, cluster), "largest operator"), (_held_work(atoms, cluster), "memory")]
    return max(found, key=lambda bound: bound[0])


def refuse_too_small(atoms: Atoms, cluster: Cluster) -> None:
    """Raises `DoesNotFit` where what has to be held is more than all devices together, or an atom more than the largest device."""
    need, have = sum(atoms.held_bytes), sum(device.memory_bytes for device in cluster.devices)
    if need > have:
        raise DoesNotFit(
            f"the graph holds {show_bytes(need)}, and the devices together {show_bytes(have)}: {show_bytes(need - have)} too little",
            hint=f"give each of {len(cluster.devices)} devices `{enough(-(-need // len(cluster.devices)))}` or more",
        )
    largest, most = max(atoms.held_bytes), max(device.memory_bytes for device in cluster.devices)
    if largest > most:
        raise DoesNotFit(
            f"operators that go to one device hold {show_bytes(largest)}, and the largest device {show_bytes(most)}",
            hint=f"give at least one device `{enough(largest)}` or more",
        )


def _work(atoms: Atoms, cluster: Cluster) -> float:
    return sum(atoms.seconds) / sum(device.speed for device in cluster.devices)


def _largest(atoms: Atoms, cluster: Cluster) -> float:
    """Of the n·k + 1 largest atoms, some n + 1 share one of k devices; even the smallest of them, on the fastest."""
    count, fastest = len(cluster.devices), max(device.speed for device in cluster.devices)
    ranked = sorted(atoms.seconds, reverse=True)
    shared = range((len(ranked) - 1) // count + 1)
    return max(sum(ranked[each * count - each : each * count + 1]) for each in shared) / fastest


def _held_work(atoms: Atoms, cluster: Cluster) -> float:
    """A device can do no more work than the densest atoms that fit on it; what that leaves, the others must do."""
    most = [_densest(atoms.seconds, atoms.held_bytes, device.memory_bytes) for device in cluster.devices]
    work, power = sum(atoms.seconds), sum(device.speed for device in cluster.devices)
    for full, device in sorted(zip(most, cluster.devices, strict=True), key=lambda pair: pair[0] / pair[1].speed):
        seconds = max(0.0, work / power)
        if seconds * device.speed <= full:
            return seconds
        work, power = work - full, power - device.speed
        if power <= 1e-12 * device.speed:
            break
    return 0.0  # it does not fit, which `refuse_too_small` or the search will say


def _densest(seconds: Sequence[float], held: Sequence[int], room: int) -> float:
    """The most seconds of atoms that `room` bytes hold, if atoms could be cut."""
    total = 0.0
    for work, size in sorted(
        zip(seconds, held, strict=True), key=lambda pair: pair[0] / pair[1] if pair[1] else float("inf"), reverse=True
    ):
        if size > room:
            return total + work * room / size
        total, room = total + work, room - size
    return total
