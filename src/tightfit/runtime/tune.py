"""Tune: the one training loop, for whatever the techniques made trainable. Draw a batch, split it, forward and backward, update, note.

It stands on accelerate, so `accelerate launch` runs it on several devices; each process keeps the budget by itself.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from tightfit import steps
from tightfit.contracts import Policy
from tightfit.data.text import IGNORED, Order, Samples, collate, split_rows
from tightfit.runtime.build import Built
from tightfit.runtime.checkpoint import Checkpoints
from tightfit.runtime.journal import Journal
from tightfit.runtime.observe_steps import StepObserver
from tightfit.terms.errors import TightfitError
from tightfit.terms.report import Report
from tightfit.terms.tuning import Tuning

Watch = Callable[[int, int, float], None]
"""Told (steps done, steps in all, loss) after each step."""


@dataclass(frozen=True)
class Lesson:
    """What is learned from, and what is held out."""

    samples: Samples
    held_out: Samples | None = None

    @property
    def held_bytes(self) -> int:
        """What the samples take in RAM."""
        return self.samples.held_bytes + (self.held_out.held_bytes if self.held_out else 0)


def tune(
    built: Built,
    lesson: Lesson,
    tuning: Tuning,
    checkpoints: Checkpoints,
    accelerator: Accelerator,
    resume: bool = False,
    watch: Watch = lambda done, whole, loss: None,
) -> Report:
    """Train `built` on `lesson`, leave what it learned in the checkpoints' folder, and report what it took against the plan.

    Raises `TightfitError` when the loss is not finite (the last checkpoint stays), when the process goes over its budget (after a
    checkpoint), and where there is nothing to do.
    """
    work, order = built.plan.workload, Order(len(lesson.samples), built.plan.workload.batch, tuning.seed)
    last = tuning.steps or math.ceil(tuning.epochs * order.steps_per_epoch)
    if last < 1:
        raise TightfitError("there is no step to make", hint="ask for some `--steps`, or more `--epochs`")
    optimizer = steps.make_optimizer(built.model, work.optimizer, tuning.learning_rate, tuning.weight_decay)
    schedule = LambdaLR(optimizer, partial(rate_factor, tuning, last))
    model, optimizer = _prepared(accelerator, built.model, optimizer)
    set_seed(tuning.seed, device_specific=True)
    first = checkpoints.resume(built, schedule, last) if resume else 0
    loop = _Loop(built, model, optimizer, lesson, tuning, accelerator)
    scores: dict[str, float] = {}
    with StepObserver(built, optimizer, last - first) as observer, Journal(checkpoints.folder, accelerator, first) as journal:
        if first == 0 and lesson.held_out:
            scores["held_out_loss_before"] = journal.held_out(0, loop.evaluate(lesson.held_out))
        for step in range(first, last):
            parts = loop.split(lesson.samples, order.indices(step))
            with observer.step(parts.largest):
                loss, norm = loop.step(step, parts, checkpoints)
            rate = tuning.learning_rate * rate_factor(tuning, last, step)
            schedule.step()
            scores["loss"] = loss
            journal.step(
                step + 1, loss=loss, gradient_norm=norm, learning_rate=rate, tokens=parts.tokens, seconds=observer.step_seconds[-1]
            )
            watch(step + 1, last, loss)
            if lesson.held_out and (step + 1 == last or (tuning.evaluate_every and (step + 1) % tuning.evaluate_every == 0)):
                scores["held_out_loss"] = journal.held_out(step + 1, loop.evaluate(lesson.held_out))
            overrun = observer.overrun()
            if overrun or step + 1 == last or (step + 1) % (tuning.save_every or order.steps_per_epoch) == 0:
                loop.end_policies()
                checkpoints.save(step + 1, built, schedule)
            if overrun:
                raise overrun
        loop.end_policies()
        checkpoints.finish(last, built)
        scores.setdefault("loss", journal.last_loss)
    return observer.report(journal.tokens, scores | {"steps": float(last)}, lesson.samples.notes)


def rate_factor(tuning: Tuning, last: int, step: int) -> float:
    """The schedule's share of the learning rate at `step` of `last`: a linear warm-up, then constant, linear or cosine down to zero."""
    warmup = 0 if tuning.schedule == "constant" else math.ceil(tuning.warmup * last)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, last - warmup)
    return {"linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}.get(tuning.schedule, 1.0)


def _prepared(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """As accelerate wraps them. What is frozen is the same everywhere and lies where it should: nobody moves or sends it."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    model._ddp_params_and_buffers_to_ignore = [*frozen, *(name for name, _ in model.named_buffers())]
    varies = any(isinstance(module, Policy) for module in model.modules())  # it may leave parameters out of a step
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=varies, gradient_as_bucket_view=True)
    return accelerator.prepare(model, optimizer, device_placement=[False, False])


@dataclass(frozen=True)
class _Parts:
    """One process's share of a batch, in micro-batches of sample numbers, and the tokens that count in the whole batch."""

    rows: list[list[int]]
    idle: bool  # more processes than rows: it goes along with one that does not count
    counted: int
    tokens: int
    largest: tuple[int, int]


@dataclass(frozen=True)
class _Loop:
    """What every step needs."""

    built: Built
    model: nn.Module  # as accelerate wraps it
    optimizer: torch.optim.Optimizer
    lesson: Lesson
    tuning: Tuning
    accelerator: Accelerator

    @property
    def policies(self) -> Iterator[Policy]:
        return (module for module in self.built.model.modules() if isinstance(module, Policy))

    def split(self, samples: Samples, indices: list[int]) -> _Parts:
        """This process's rows, no more at a time than planned."""
        work, together = self.built.plan.workload, self.accelerator.num_processes
        longest_side = max(work.tokens, work.target_tokens)
        mine = indices[self.accelerator.process_index :: together] or indices[:1]
        lengths = samples.lengths
        rows = [[mine[at] for at in part] for part in split_rows([int(lengths[index]) for index in mine], work.rows, longest_side)]
        longest = [int(lengths[part].max()) for part in rows]
        return _Parts(
            rows,
            idle=self.accelerator.process_index >= len(indices),
            counted=sum(_counted(self.built, torch.from_numpy(samples.sample(index)[1])) for index in indices),
            tokens=int(lengths[indices].sum()),
            largest=(max(length * len(part) for length, part in zip(longest, rows, strict=True)), max(longest)),
        )

    def step(self, step: int, parts: _Parts, checkpoints: Checkpoints) -> tuple[float, float]:
        """One update: the loss is the mean over all tokens that count, however the batch was split. Returns it and the gradients' norm."""
        for policy in self.policies:
            policy.begin_step(step)
        self.model.train()
        loss = torch.zeros((), device=self.built.device)
        for number, rows in enumerate(parts.rows):
            batch = _batch_of(self.built, self.lesson.samples, rows)
            share = 0.0 if parts.idle else _counted(self.built, batch["labels"]) / parts.counted
            share *= self.accelerator.num_processes  # DDP takes their mean
            is_last = number == len(parts.rows) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                loss += steps.backward(self.model, batch, share, self.built.plan.workload.precision, run=self.accelerator.backward)
        trained = [parameter for parameter in self.built.model.parameters() if parameter.requires_grad]
        norm = self.accelerator.clip_grad_norm_(trained, self.tuning.clip or math.inf)
        seen, height = float(self.accelerator.reduce(loss, "mean")), float(norm)
        if not math.isfinite(seen + height):
            raise TightfitError(
                f"the {'gradient' if math.isfinite(seen) else 'loss'} is not finite at step {step + 1}; {checkpoints.last_words()}",
                hint="try a smaller `--lr`, or a `--clip`; the data's longest samples are worth a look too",
            )
        steps.update(self.optimizer)
        return seen, height

    def evaluate(self, samples: Samples) -> float:
        """The mean loss over all tokens of `samples` that count, with the whole of what was learned."""
        self.end_policies()
        self.built.model.eval()
        mine = range(self.accelerator.process_index, len(samples), self.accelerator.num_processes)
        summed, counted = summed_loss(self.built, samples, mine)
        both = torch.tensor([summed, counted], dtype=torch.float64, device=self.built.device)
        summed, counted = self.accelerator.reduce(both, "sum").tolist()
        return summed / counted

    def end_policies(self) -> None:
        """No step is under way."""
        for policy in self.policies:
            policy.end_training()


@torch.no_grad()
def summed_loss(built: Built, samples: Samples, indices: Iterable[int]) -> tuple[float, int]:
    """The loss over the samples at `indices`, summed over the tokens that count, and their number; in micro-batches as planned."""
    chosen, work, summed, counted = list(indices), built.plan.workload, 0.0, 0
    lengths = [int(length) for length in samples.lengths[chosen]]
    for part in split_rows(lengths, work.rows, max(work.tokens, work.target_tokens)) if chosen else ():
        batch = _batch_of(built, samples, [chosen[at] for at in part])
        with torch.autocast(built.device.type, torch.bfloat16, enabled=work.precision == "bf16"):
            count = _counted(built, batch["labels"])
            summed += float(steps.loss_of(built.model, batch)) * count
        counted += count
    return summed, counted


def _batch_of(built: Built, samples: Samples, rows: list[int]) -> dict[str, Tensor]:
    batch = collate(samples, rows, built.model.config.is_encoder_decoder)
    return {name: tensor.to(built.device) for name, tensor in batch.items()}


def _counted(built: Built, labels: Tensor) -> int:
    """Tokens whose loss counts: a decoder predicts no first token.  # labels: (…, tokens)"""
    return int((labels[..., 0 if built.model.config.is_encoder_decoder else 1 :] != IGNORED).sum())
