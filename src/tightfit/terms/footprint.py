"""Footprint: bytes by kind, at the peak of each phase, and the peak of them all."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["weights", "gradients", "optimizer", "activations", "kv_cache", "workspace", "overhead"]
KINDS: tuple[Kind, ...] = ("weights", "gradients", "optimizer", "activations", "kv_cache", "workspace", "overhead")

Bytes = Mapping[str, int]
"""Bytes by kind; a kind that is absent holds nothing."""


def total(parts: Bytes) -> int:
    """All kinds together."""
    return sum(parts.values())


def combine(terms: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, Any]:
    """The sum of `factor · parts` name by name: how a phase is extended from a few blocks to many."""
    result: dict[str, Any] = {}
    for factor, parts in terms:
        for name, size in parts.items():
            result[name] = result.get(name, 0) + factor * size
    return result


@dataclass(frozen=True)
class Footprint:
    """One workload on the compute tier, phase by phase in order.

    `phases`: bytes by kind at the phase's highest moment. `work`: `flops`, `bytes_touched` (read and written by
    operations) and `operations` within the phase.
    """

    phases: Mapping[str, Bytes]
    work: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def peak_phase(self) -> str:
        """The phase that holds the peak."""
        return max(self.phases, key=lambda name: total(self.phases[name]))

    @property
    def peak(self) -> Bytes:
        """Bytes by kind at the peak."""
        return self.phases[self.peak_phase]

    @property
    def peak_bytes(self) -> int:
        """All bytes at the peak."""
        return total(self.peak)

    def work_of(self, stem: str) -> dict[str, float]:
        """The work of all phases whose name begins with `stem`, such as `decode`."""
        return combine((1, work) for name, work in self.work.items() if name.startswith(stem))
