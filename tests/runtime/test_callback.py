"""callback: every policy in the model hears of each step once, and of its end before anything is evaluated or saved."""

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from tightfit.runtime.callback import PolicyCallback


class Noting(nn.Module):
    """A policy that notes what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[object] = []

    def begin_step(self, step: int) -> None:
        self.heard.append(step)

    def end_training(self) -> None:
        self.heard.append("end")


def told(model: nn.Module | None, tmp_path, *events: str) -> None:
    """Two updates numbered on from 7, as in a resumed run."""
    callback, args = PolicyCallback(), TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    state, control = TrainerState(global_step=7), TrainerControl()
    for event in events:
        assert getattr(callback, event)(args, state, control, model=model, optimizer=None) is None
        state.global_step += event == "on_step_end"


def test_policies_hear_of_begin_and_end(tmp_path):
    """However deep they lie; other modules are left alone."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Noting()), Noting())
    told(model, tmp_path, "on_train_begin", "on_step_begin", "on_substep_end", "on_step_end", "on_evaluate", "on_save")
    assert [module.heard for module in model.modules() if isinstance(module, Noting)] == [[7, "end"]] * 2
    told(model, tmp_path, "on_step_begin", "on_train_end")
    assert model[2].heard == [7, "end", 7, "end"]


def test_the_steps_are_numbered_on(tmp_path):
    model = nn.Sequential(Noting())
    told(model, tmp_path, "on_step_begin", "on_step_end", "on_step_begin", "on_step_end")
    assert model[0].heard == [7, "end", 8, "end"]


def test_without_policies_it_does_nothing(tmp_path):
    told(nn.Linear(2, 2), tmp_path, "on_step_begin", "on_step_end", "on_train_end")
    told(None, tmp_path, "on_step_begin", "on_step_end", "on_train_end")
