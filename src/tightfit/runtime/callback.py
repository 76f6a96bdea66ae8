"""Callback: tell the modules that act at each training step which step begins, when Hugging Face's `Trainer` runs the loop.

It knows nothing of optimizers: for learning rates of their own give `Trainer` the optimizer of `steps.make_optimizer`.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tightfit.contracts import Policy


class PolicyCallback(TrainerCallback):
    """For `Trainer(…, callbacks=[PolicyCallback()])`, and TRL's trainers, on a model with a `Policy` inside, such as `dylora` leaves.

    Each update begins with `begin_step` and ends with `end_training`, so that whatever `Trainer` does between two updates, logging,
    evaluation or saving, finds the whole of what was learned. A resumed run goes on with the number of its next step.
    """

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **others: Any
    ) -> None:
        """Before the first micro-batch of an update."""
        for policy in _policies(model):
            policy.begin_step(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **others: Any
    ) -> None:
        """After the update and before evaluation and saving, of which `Trainer` tells only when they are done."""
        for policy in _policies(model):
            policy.end_training()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **others: Any
    ) -> None:
        """Also where the last update was left half done."""
        for policy in _policies(model):
            policy.end_training()


def _policies(model: nn.Module | None) -> Iterator[Policy]:
    return (module for module in model.modules() if isinstance(module, Policy)) if model is not None else iter(())
