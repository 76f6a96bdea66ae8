"""Observe steps: measure training while it runs: tensor bytes of some steps, the time of each, the process's memory always."""

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from tightfit.contracts import Policy
from tightfit.rehearse.meter import Meter
from tightfit.runtime.build import Built
from tightfit.runtime.observe import Account
from tightfit.terms.errors import TightfitError
from tightfit.terms.report import Report


class StepObserver:
    """Goes along with the steps of a run. On the CPU it meters the second step, which finds the optimizer's state, and after it each
    whose largest micro-batch is larger than any before, or the only one: the meter costs some microseconds an operation.
    """

    def __init__(self, built: Built, optimizer: torch.optim.Optimizer, count: int) -> None:
        self.account = Account(built)
        self._single = count == 1
        self.step_seconds: list[float] = []
        self._optimizer = optimizer
        self._largest = (0, 0)  # token ids of the largest micro-batch that was metered, and the longest row

    def __enter__(self) -> "StepObserver":
        self.account.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.account.end()

    @contextmanager
    def step(self, largest: tuple[int, int]) -> Iterator[None]:
        """Around one update whose largest micro-batch has so many token ids in all and in its longest row."""
        began = time.perf_counter()
        steady = bool(self.step_seconds)
        larger = largest[0] > self._largest[0] or largest[1] > self._largest[1]
        metered = not self.account.on_gpu and (self._single or (steady and larger))
        with self._metered() if metered else ExitStack():
            yield
        if steady:
            self._largest = (max(largest[0], self._largest[0]), max(largest[1], self._largest[1]))
        if self.account.on_gpu:
            torch.cuda.synchronize()
        self.step_seconds.append(time.perf_counter() - began)

    def overrun(self) -> TightfitError | None:
        """What to say where the process holds more than its budget."""
        try:
            self.account.refuse_overrun()
        except TightfitError as error:
            return error
        return None

    def report(self, tokens: int, scores: Mapping[str, float], notes: tuple[str, ...]) -> Report:
        """What was seen, held against the plan."""
        times = self.step_seconds
        seconds = {"first_step": times[0] if times else 0.0, "step": statistics.median(times[1:] or times or [0.0])}
        work = self.account.built.plan.workload
        varies = any(isinstance(module, Policy) for module in self.account.built.model.modules())  # the plan is for its largest step
        complete = self._largest[0] >= work.rows * max(work.tokens, work.target_tokens) and not varies
        return self.account.report(seconds, tokens, complete, notes=notes, scores=scores)

    @contextmanager
    def _metered(self) -> Iterator[None]:
        """A step under the meter; gradients are told apart as soon as they are there."""
        meter, model = Meter(), self.account.built.model
        meter.adopt(self.account.weights(), "weights")
        meter.adopt(_state_of(self._optimizer), "optimizer")
        with ExitStack() as hooks:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    adopt = parameter.register_post_accumulate_grad_hook(lambda owner: meter.adopt([owner.grad], "gradients"))
                    hooks.callback(adopt.remove)
            with meter:
                yield
        self.account.note(meter.footprint().peak)


def _state_of(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    return (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
