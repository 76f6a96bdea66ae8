"""Load program: the least largest load of a small graph as an integer program, with the bound that the solver proves."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tightfit.planner.placement.atoms import Atoms
from tightfit.terms.cluster import Cluster


@dataclass(frozen=True)
class Solved:
    """What the solver found before its time was over."""

    device_of: tuple[int, ...] | None  # by atom; None where it found no split
    bound_seconds: float  # no split is below; infinite where it proved that there is none


def load_program(
    atoms: Atoms, cluster: Cluster, seconds_limit: float, below: float = float("inf"), order: Sequence[int] | None = None
) -> Solved:
    """The split of `atoms` with the least largest load, at most `below` seconds, by HiGHS.

    Memory counts what atoms hold for good; links count as the slowest. With an `order` of the devices the split is contiguous, and data
    flows through them in this order. Source: Tarnawski et al., NeurIPS 2020, section 5.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    program = _Program(len(atoms.members), len(cluster.devices), len(atoms.outputs))
    _assign(program, atoms, cluster)
    _send(program, atoms)
    for sources, target in ((sources, target) for target, sources in enumerate(atoms.follows) if order is not None):
        for source in sources:
            for end in range(1, len(order or ())):
                before = (order or ())[:end]
                program.add([(program.on(target, d), 1.0) for d in before] + [(program.on(source, d), -1.0) for d in before], 0.0)
    rows, columns, values = zip(*program.entries, strict=True)
    matrix = csr_array((values, (rows, columns)), shape=(len(program.lower), program.size))
    places = program.atoms * program.devices
    whole = np.repeat([1, 0], [places, program.size - places])
    most: Any = np.append(np.ones(program.size - 1), below)
    limits: Any = np.array([program.lower, program.upper])
    found = milp(
        np.append(np.zeros(program.size - 1), 1.0),
        integrality=whole,
        bounds=Bounds(0.0, most),
        constraints=LinearConstraint(matrix, *limits),
        options={"time_limit": seconds_limit, "mip_rel_gap": 1e-6},
    )
    bound = float("inf") if found.status == 2 else float(found.mip_dual_bound) if found.mip_dual_bound is not None else 0.0
    if found.x is None:
        return Solved(None, bound)
    chosen = found.x[:places].reshape(program.atoms, program.devices)
    return Solved(tuple(int(device) for device in chosen.argmax(1)), bound)


@dataclass
class _Program:
    """Rows of an integer program: where each atom is, which device reads and which sends each output, and the largest load."""

    atoms: int
    devices: int
    outputs: int
    entries: list[tuple[int, int, float]] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)

    @property
    def size(self) -> int:
        return (self.atoms + 2 * self.outputs) * self.devices + 1

    def on(self, atom: int, device: int) -> int:
        """The variable: `atom` is on `device`."""
        return atom * self.devices + device

    def reads(self, output: int, device: int) -> int:
        """The variable: `device` reads `output` from another."""
        return (self.atoms + output) * self.devices + device

    def sends(self, output: int, device: int) -> int:
        """The variable: `device` sends `output`."""
        return (self.atoms + self.outputs + output) * self.devices + device

    def add(self, row: Sequence[tuple[int, float]], upper: float, lower: float = -float("inf")) -> None:
        """A row, which lies between `lower` and `upper`."""
        self.entries += [(len(self.lower), column, value) for column, value in row]
        self.lower.append(lower)
        self.upper.append(upper)


def _assign(program: _Program, atoms: Atoms, cluster: Cluster) -> None:
    """Each atom on one device, in its memory, and the load of each device at most the largest."""
    for atom in range(program.atoms):
        program.add([(program.on(atom, device), 1.0) for device in range(program.devices)], 1.0, 1.0)
    for number, device in enumerate(cluster.devices):
        scale = 1.0 / max(1, device.memory_bytes)
        program.add(
            [(program.on(atom, number), held * scale) for atom, held in enumerate(atoms.held_bytes)], 1.0 if device.memory_bytes else 0.0
        )
        load = [(program.on(atom, number), seconds / device.speed) for atom, seconds in enumerate(atoms.seconds)]
        for output, sent in enumerate(atoms.outputs):
            load += [(program.reads(output, number), sent.seconds), (program.sends(output, number), sent.seconds)]
        program.add([*load, (program.size - 1, -1.0)], 0.0)


def _send(program: _Program, atoms: Atoms) -> None:
    """A device with a reader and without the writer reads; one with the writer and without a reader sends."""
    for output, sent in enumerate(atoms.outputs):
        for device in range(program.devices):
            writer = program.on(sent.writer, device)
            for reader in (program.on(reader, device) for reader in sent.readers):
                program.add([(reader, 1.0), (writer, -1.0), (program.reads(output, device), -1.0)], 0.0)
                program.add([(writer, 1.0), (reader, -1.0), (program.sends(output, device), -1.0)], 0.0)
