"""Candidates: the sets of techniques worth rehearsing for a workload, by what they promise and not by their names."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tightfit.contracts import QUALITIES, Quality, Settles, Solves, Stage, Transform
from tightfit.terms.workload import Workload

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """Techniques by name, and the quality that they keep together."""

    chosen: Mapping[str, Transform]

    @property
    def techniques(self) -> tuple[Transform, ...]:
        """The techniques, in the order of their names."""
        return tuple(self.chosen.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The techniques' names; empty for the model as it is stored."""
        return tuple(self.chosen)

    @property
    def settings(self) -> dict[str, Settings]:
        """For each technique the settings that are not what they are by default."""
        return {name: _changed(technique) for name, technique in self.chosen.items()}

    @property
    def quality(self) -> Quality:
        """The worst of all."""
        return QUALITIES[max((QUALITIES.index(technique.quality) for technique in self.techniques), default=0)]

    def recomputes(self) -> bool:
        """Whether blocks are recomputed in the backward pass, without which they cannot stream while tuning."""
        return any(technique.stage == Stage.RECOMPUTE for technique in self.techniques)

    def settled(self, device: str) -> "Candidate":
        """With nothing left open for a run on `device` (`cpu` or `cuda`). Only what is tried is asked: the answer may load a library."""
        return Candidate({name: item.settled(device) if isinstance(item, Settles) else item for name, item in self.chosen.items()})


def candidates(workload: Workload, available: Mapping[str, type[Any]], asked: Mapping[str, Settings]) -> list[Candidate]:
    """All candidates for `workload`, best quality first; their settings are not settled yet.

    `asked` techniques are in every one. A quantization is added only where none was asked for, and only where the base is frozen, as
    a quantized weight is: for work without gradients, and for tuning what an asked adapter adds. Recomputation is an alternative
    for tuning.
    """
    quantizations: list[dict[str, Settings]] = [{}]
    frozen = workload.task != "tune" or _has_stage(asked, available, Stage.ADAPT)
    if frozen and not _has_stage(asked, available, Stage.QUANTIZE):
        by_itself = [name for name, kind in available.items() if kind.stage == Stage.QUANTIZE and not issubclass(kind, Solves)]
        quantizations += [dict[str, Settings]({name: {}}) for name in by_itself]
    recomputations: list[dict[str, Settings]] = [{}]
    if workload.task == "tune" and not _has_stage(asked, available, Stage.RECOMPUTE):
        recomputations += [dict[str, Settings]({name: {}}) for name, kind in available.items() if kind.stage == Stage.RECOMPUTE]
    found = [
        _candidate({**asked, **quantization, **recomputation}, available)
        for quantization in quantizations
        for recomputation in recomputations
    ]
    return sorted(found, key=lambda candidate: QUALITIES.index(candidate.quality))


def allowed(candidate: Candidate, wished: Quality, asked: Mapping[str, Settings]) -> bool:
    """Whether `candidate` keeps the wished quality; what the user asked for by name is always allowed."""
    chosen_by_name = set(candidate.names) == set(asked) and bool(asked)
    return chosen_by_name or QUALITIES.index(candidate.quality) <= QUALITIES.index(wished) or _only_asked_lowers(candidate, asked)


def _only_asked_lowers(candidate: Candidate, asked: Mapping[str, Settings]) -> bool:
    added = [technique for name, technique in candidate.chosen.items() if name not in asked]
    return bool(asked) and all(technique.quality == "exact" for technique in added)


def _candidate(settings: Mapping[str, Settings], available: Mapping[str, type[Any]]) -> Candidate:
    return Candidate({name: available[name](**values) for name, values in settings.items()})


def _changed(technique: Transform) -> Settings:
    """The settings that are not what they are by default."""
    return {item.name: getattr(technique, item.name) for item in fields(technique) if getattr(technique, item.name) != item.default}  # type: ignore[arg-type]


def _has_stage(asked: Mapping[str, Settings], available: Mapping[str, type[Any]], stage: Stage) -> bool:
    return any(available[name].stage == stage for name in asked)
