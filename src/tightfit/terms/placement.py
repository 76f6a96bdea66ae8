"""Placement: where each operator goes, what the simulated step takes, and how far from the best it can be."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph


@dataclass(frozen=True)
class Placement:
    """A device for each operator, and the order in which a device starts what it has."""

    device_of: tuple[int, ...]  # by operator
    order: tuple[int, ...]  # all operators, each after what it reads; a device runs its own in this order
    by: str  # which algorithm found it


@dataclass(frozen=True)
class Transfer:
    """One output on its way to one device."""

    operator: int
    source: int
    target: int
    start: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """The simulated step: when what runs and travels, and each device's memory over time."""

    start: tuple[float, ...]  # seconds, by operator
    end: tuple[float, ...]
    transfers: tuple[Transfer, ...]
    memory: tuple[tuple[tuple[float, int], ...], ...]  # by device: (from this second on, so many bytes), in order of time

    @property
    def makespan(self) -> float:
        """Seconds from the start of the first operator to the end of the last."""
        return max(self.end)

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """The most that each device holds at any time."""
        return tuple(max((held for _, held in steps), default=0) for steps in self.memory)


@dataclass(frozen=True)
class Placed:
    """The answer: a placement, what it gives, and how far from the best it can be at most."""

    objective: str  # makespan, or throughput
    seconds: float  # the makespan, or the largest load of a device
    bound_seconds: float  # no placement (of a pipeline: no contiguous split, unless the answer is scattered itself) can be below
    bound_by: str  # what the bound rests on: critical path, work, largest operator, memory, optimum
    placement: Placement
    peak_bytes: tuple[int, ...]
    tried: Mapping[str, float | None]  # seconds by algorithm; None where it found no placement that fits
    place_seconds: float  # that finding it took

    @property
    def gap(self) -> float:
        """How far above the bound the answer is, as a share of the bound: 0.05 says that at most 5 % could be gained."""
        return self.seconds / self.bound_seconds - 1 if self.bound_seconds else 0.0

    @property
    def rivals(self) -> str:
        """In words, what the bound holds for."""
        return "contiguous split" if self.objective == "throughput" and self.placement.by != "scattered" else "placement"

    @property
    def standing(self) -> str:
        """In words, how far from the best it is at most; what a solver leaves open is not told."""
        return f"the best {self.rivals}" if self.gap < 2e-4 else f"at most {self.gap:.1%} from the best {self.rivals}"

    def to_json(self) -> dict[str, Any]:
        """The answer without its graph; operators stand by number."""
        return {
            "objective": self.objective,
            "seconds": self.seconds,
            "bound_seconds": self.bound_seconds,
            "bound_by": self.bound_by,
            "gap": self.gap,
            "by": self.placement.by,
            "device_of": list(self.placement.device_of),
            "order": list(self.placement.order),
            "peak_bytes": list(self.peak_bytes),
            "tried": dict(self.tried),
            "place_seconds": self.place_seconds,
        }


@dataclass(frozen=True)
class PlaceReport:
    """What `place` says: the answer beside the graph and the devices that it is for, and the simulated step."""

    graph: Graph
    ids: tuple[str, ...]  # what the graph's source calls each operator
    cluster: Cluster
    placed: Placed
    schedule: Schedule
    loads: tuple[float, ...]  # seconds that each device computes, receives and sends for one sample
    device_map: Mapping[str, int] | None = None  # module paths by device, for `from_pretrained(device_map=…)`
    block_devices: tuple[int, ...] = ()  # of a model's repeated blocks, where they are whole
    notes: tuple[str, ...] = ()  # what else a person should know
    scores: Mapping[str, float] = field(default_factory=dict)  # what a recipe found beside it

    def to_json(self) -> dict[str, Any]:
        """One JSON object. `assignment` is the number of a device by what the source calls an operator."""
        device_of = self.placed.placement.device_of
        devices = [
            {
                "name": device.name,
                "memory_bytes": device.memory_bytes,
                "speed": device.speed,
                "peak_bytes": peak,
                "load_seconds": load,
                "operators": device_of.count(number),
            }
            for number, (device, peak, load) in enumerate(zip(self.cluster.devices, self.placed.peak_bytes, self.loads, strict=True))
        ]
        return {
            "graph": self.graph.name,
            "operators": len(self.graph.operators),
            "edges": len(self.graph.edges),
            "makespan_seconds": self.schedule.makespan,
            "largest_load_seconds": max(self.loads),
            "devices": devices,
            **self.placed.to_json(),
            "assignment": dict(zip(self.ids, device_of, strict=True)),
            "device_map": None if self.device_map is None else dict(self.device_map),
            "block_devices": list(self.block_devices),
            "notes": list(self.notes),
            "scores": dict(self.scores),
        }
