"""Tuning: what the questions about tuning share: models that techniques made trainable, and whole steps on fixed data."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tightfit import catalog, steps
from tightfit.describe.blocks import blocks_of
from tightfit.describe.skeleton import Skeleton
from tightfit.rehearse.fake import inputs_for
from tightfit.runtime.build import Built
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload


def made(techniques: Sequence[str]) -> list[Any]:
    """Techniques from texts such as `nf4:layout=standard`."""
    return [catalog.make(*catalog.parse(text)) for text in techniques]


def resident_plan(skeleton: Skeleton, workload: Workload, techniques: Sequence[str]) -> Plan:
    """A plan of exactly these techniques, all in RAM, without a budget: nothing is left to the planner."""
    blocks = len(blocks_of(skeleton.meta_model()))
    return Plan.all_resident(skeleton.name, workload, blocks, dict(catalog.parse(text) for text in techniques))


def random_ids(shape: tuple[int, ...], high: int) -> Tensor:
    """Token ids below `high`, the same in every run and for every peer."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(0))


def batch_of(model: nn.Module, workload: Workload) -> dict[str, Tensor]:
    """A whole batch of random tokens with labels, where the model computes."""
    whole = Workload(workload.task, workload.batch, workload.tokens)
    return {name: tensor.to(next(model.parameters()).device) for name, tensor in inputs_for(model, whole, random_ids).items()}


def stepper(built: Built) -> Callable[[], float]:
    """A function that takes one whole update, split as planned, and gives the loss."""
    built.model.train()
    work = built.plan.workload
    optimizer, batch = steps.make_optimizer(built.model, work.optimizer), batch_of(built.model, work)
    parts = [{name: tensor[at : at + work.rows] for name, tensor in batch.items()} for at in range(0, work.batch, work.rows)]

    def step() -> float:
        losses = [steps.backward(built.model, part, len(part["input_ids"]) / work.batch, work.precision) for part in parts]
        steps.update(optimizer)
        return float(sum(losses))

    return step


def timed_steps(step: Callable[[], float], warm_up: int, count: int) -> dict[str, Any]:
    """Seconds and losses of `count` steps after `warm_up` of which only the losses are kept."""
    losses, seconds = [], []
    for _ in range(warm_up + count):
        began = time.perf_counter()
        losses.append(step())  # a number: a GPU is done then
        seconds.append(time.perf_counter() - began)
    timed = seconds[warm_up:]
    return {"seconds_per_step": statistics.median(timed) if timed else None, "step_seconds": timed, "losses": losses}
