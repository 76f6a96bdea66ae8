"""Outcome: what the planner is asked, and one candidate after it was tried."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tightfit.contracts import Quality
from tightfit.describe.skeleton import Skeleton
from tightfit.planner.candidates import Candidate, Settings
from tightfit.planner.pace import Pace
from tightfit.planner.residency import Residency
from tightfit.planner.weigh import Weights
from tightfit.terms.budget import Budget
from tightfit.terms.footprint import Footprint
from tightfit.terms.workload import Workload


@dataclass(frozen=True)
class Request:
    """What the planner is asked."""

    skeleton: Skeleton
    workload: Workload
    budget: Budget
    quality: Quality = "exact"
    asked: Mapping[str, Settings] = field(default_factory=dict)
    random_weights: bool = False
    alternatives: bool = False  # also say what other qualities would give; costs their rehearsals
    slots: int = 2  # one block computes while the next is read; a third evens out a jittery disk, at the price of a resident block


@dataclass(frozen=True)
class Spread:
    """Blocks on several GPUs that are alike, all of which stay where they are. What stands outside of blocks is on GPU 0."""

    devices: tuple[int, ...]  # of each block, the number of its GPU
    predicted: tuple[Mapping[str, int], ...]  # of each GPU that is used, kind → bytes at the peak of the run
    phases: Mapping[str, Mapping[str, int]]  # of the fullest one
    changes: int  # how often hidden states change the GPU in a pass
    alone: float | None  # times as long as one GPU would take; None: one does not suffice


@dataclass(frozen=True)
class Outcome:
    """One candidate, tried on the workload as it would be split: what it needs at least, and how it would run.

    `residency` is None if it does not fit.

    `predicted`: tier → kind → bytes at the peak of the run; `needed`: at the highest moment, loading included.
    """

    candidate: Candidate
    workload: Workload
    footprint: Footprint
    weights: Weights
    residency: Residency | None
    predicted: Mapping[str, Mapping[str, int]]
    needed: Mapping[str, Mapping[str, int]]
    pace: Pace
    spread: Spread | None = None
    left_idle: str = ""  # why of several GPUs one is used
