"""Planning: one call to the planner, for tests that make many. What knows nothing of budgets is done once."""

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from families import make
from torch import nn

from tightfit import catalog
from tightfit.contracts import Quality, Stage
from tightfit.describe.skeleton import Skeleton
from tightfit.describe.source import describe
from tightfit.planner import choose as choosing
from tightfit.planner.choose import choose
from tightfit.planner.outcome import Request
from tightfit.planner.weigh import weigh
from tightfit.rehearse.rehearsal import rehearse
from tightfit.terms.budget import Budget
from tightfit.terms.machine import Machine
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload

MACHINE = Machine(probed=True, overhead_ram=3_000_000, overhead_gpu=1_000_000, overhead_bitsandbytes=200_000, allocator_slack=0.01)
GENERATE, TUNE = Workload("generate", 1, 48, 16), Workload("tune", 1, 64)
PLENTY = 1 << 40
ALL = catalog.technique_names()

_KNOWN = {}


@functools.cache
def skeleton(family: str = "llama", trainable: str = "") -> Skeleton:
    """A live model; `trainable` names the only parameters that learn."""
    model = make(family, torch.bfloat16)
    if trainable:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable in name)
    return replace(describe(model), name=f"{family}{trainable}")


def planned(
    workload: Workload = GENERATE,
    ram: int = PLENTY,
    gpu: int = 0,
    disk: int = PLENTY,
    quality: str = "exact",
    names: list[str] = ALL,
    asked: dict[str, dict[str, object]] | None = None,
    model: Skeleton | None = None,
    machine: Machine = MACHINE,
    more: dict[str, type] | None = None,
    random_weights: bool = False,
    gpus: int = 1,
) -> Plan:
    """A plan with the techniques `names` of the catalogue and the classes `more`. Models are told apart by their names."""
    available = {name: catalog.technique(name) for name in names} | (more or {})
    request = Request(model or skeleton(), workload, Budget(ram, gpu, disk, gpus), quality, asked or {}, random_weights, alternatives=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "rehearse", _rehearsed)
        patch.setattr(choosing, "weigh", _weighed)
        return choose(request, machine, available)


def _rehearsed(make_model, workload, techniques):
    return _once(("rehearse", make_model.__self__.name, workload, techniques), lambda: rehearse(make_model, workload, techniques))


def _weighed(found, techniques, random_weights, tuned):
    return _once(("weigh", found.name, techniques, random_weights, tuned), lambda: weigh(found, techniques, random_weights, tuned))


def _once(key, work):
    if key not in _KNOWN:
        _KNOWN[key] = work()
    return _KNOWN[key]


@dataclass(frozen=True)
class LowRank:
    """A trainable low-rank pair beside every `up_proj`; all else is frozen."""

    stage: ClassVar[Stage] = Stage.ADAPT
    quality: ClassVar[Quality] = "exact"

    def apply(self, model: nn.Module) -> None:
        model.requires_grad_(False)
        for path, linear in list(model.named_modules()):
            if path.endswith("up_proj"):
                linear.down = nn.Parameter(torch.empty(4, linear.in_features, dtype=torch.bfloat16, device="meta"))
                linear.up = nn.Parameter(torch.empty(linear.out_features, 4, dtype=torch.bfloat16, device="meta"))
                linear.forward = functools.partial(_beside, linear, linear.forward)


def _beside(linear, forward, x):
    return forward(x) + x @ linear.down.T @ linear.up.T
