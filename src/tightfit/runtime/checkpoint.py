"""Checkpoint: what a run of tuning leaves on disk, whole at every moment, and how it goes on from there.

OUT/                     the adapter as it is at the end
OUT/request.json         what was asked; `--resume` holds what is asked now against it
OUT/plan.json            how it is carried out
OUT/log.jsonl            one line a step
OUT/checkpoints/step-…   the adapter, the optimizer, the schedule and the random states after that step
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler

from tightfit.runtime.adapters import NOTE, load_adapter, read_adapter, save_adapter
from tightfit.runtime.build import Built
from tightfit.runtime.files import settle, write_json
from tightfit.runtime.journal import FILE as LOG
from tightfit.terms.errors import TightfitError
from tightfit.terms.plan import Plan

_STEPS, _PREFIX, _STATE, _SCHEDULE = "checkpoints", "step-", "state", "schedule.bin"
_REQUEST, _PLAN = "request.json", "plan.json"


@dataclass(frozen=True)
class Checkpoints:
    """The folder of one run. `facts` go into every adapter that is saved: what it was made from."""

    folder: Path
    accelerator: Accelerator
    facts: Mapping[str, Any]
    keep: int = 2

    def save(self, step: int, built: Built, schedule: LRScheduler) -> None:
        """Keep the state after `step`: written beside, then renamed, so that a half one is never taken for a whole."""
        partial = self.folder / _STEPS / f".{_PREFIX}{step:06d}.partial"
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            with _without_model(self.accelerator):
                self.accelerator.save_state(str(partial / _STATE))
            self.accelerator.wait_for_everyone()  # every process has written its random states
            if self.accelerator.is_main_process:
                self._save_adapter(built, partial, step)
                torch.save(schedule.state_dict(), partial / _SCHEDULE)
                self._put_in_place(partial, step)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise TightfitError(
                f"cannot write a checkpoint after step {step}: {first}; {self.last_words()}", hint="make room on the disk, then `--resume`"
            ) from error
        self.accelerator.wait_for_everyone()

    def _put_in_place(self, partial: Path, step: int) -> None:
        """Everything is on the disk before it gets its name, and nothing loses its name half removed."""
        for path in [*partial.rglob("*"), partial]:
            settle(path)
        shutil.rmtree(self._at(step), ignore_errors=True)
        partial.replace(self._at(step))
        settle(self.folder / _STEPS)
        for old in self.steps()[: -self.keep]:
            gone = self._at(old).replace(self.folder / _STEPS / f".{_PREFIX}{old:06d}.partial")
            shutil.rmtree(gone, ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps after which there is a checkpoint."""
        names = (path.name for path in (self.folder / _STEPS).glob(f"{_PREFIX}*"))
        return sorted(int(name.removeprefix(_PREFIX)) for name in names if name.removeprefix(_PREFIX).isdigit())

    def resume(self, built: Built, schedule: LRScheduler, last: int) -> int:
        """Put the newest checkpoint's state back; returns the step after which it goes on.

        Raises `TightfitError` for a damaged checkpoint, and a run that is over and has left its adapter.
        """
        found = self.steps()
        if not found:
            return 0
        if found[-1] >= last and (self.folder / NOTE).exists():
            raise TightfitError(
                f"the run in `{self.folder}` is over: {found[-1]} of {last} steps were made",
                hint="tune with another `-o`, or use what is there",
            )
        folder = self._at(found[-1])
        states = folder / _STATE / f"random_states_{self.accelerator.process_index}.pkl"
        try:
            if not states.exists():  # accelerate would go on without a word
                raise OSError(f"`{states.name}` is missing")
            with _without_model(self.accelerator):
                self.accelerator.load_state(str(folder / _STATE))
            schedule.load_state_dict(torch.load(folder / _SCHEDULE, weights_only=True))
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise TightfitError(
                f"the checkpoint `{folder}` is damaged: {first}", hint="remove its folder; `--resume` then takes the one before"
            ) from error
        load_adapter(built, read_adapter(folder))
        return found[-1]

    def last_words(self) -> str:
        """For a message about a run that stopped."""
        found = self.steps()
        return f"its state after step {found[-1]} is in `{self._at(found[-1])}`" if found else "nothing was saved yet"

    def finish(self, step: int, built: Built) -> None:
        """What was learned, at the top of the folder."""
        if self.accelerator.is_main_process:
            self._save_adapter(built, self.folder, step)
        self.accelerator.wait_for_everyone()

    def _save_adapter(self, built: Built, folder: Path, step: int) -> None:
        save_adapter(built.model, built.plan.techniques, folder, {**self.facts, "step": step}, built.skeleton.folder)

    def _at(self, step: int) -> Path:
        return self.folder / _STEPS / f"{_PREFIX}{step:06d}"


def begin(folder: Path, request: Mapping[str, Any], plan: Plan) -> None:
    """Note what was asked and how it will be done. Raises `TightfitError` where another run lies, and where nobody may write.

    A run that ended before its first checkpoint has left nothing to lose, and gives way.
    """
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {_REQUEST, _PLAN, LOG}:
        for name in (_REQUEST, _PLAN, LOG):
            (folder / name).unlink(missing_ok=True)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        there = (folder / _REQUEST).exists()
        raise TightfitError(
            f"`{folder}` {'holds a run already' if there else 'is not an empty folder'}",
            hint="go on with it by `--resume`, or name another folder" if there else "name a new folder with `-o`",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _PLAN, plan.to_json())
        write_json(folder / _REQUEST, request)
    except OSError as error:
        raise TightfitError(f"cannot write `{folder}`: {error.strerror}", hint="name another folder, or make room") from error


def check_resumable(folder: Path, request: Mapping[str, Any]) -> None:
    """Raise `TightfitError` where there is no run in `folder` to go on with, or one that was asked something else."""
    before, now = _read(folder / _REQUEST), json.loads(json.dumps(request, default=list))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise TightfitError(
                f"`{folder}` was tuned with another {name}: {_short(before.get(name))}, now it is {_short(now.get(name))}",
                hint="ask for the same to go on, or leave out `--resume` and name another folder",
            )


def plan_of_run(folder: Path) -> Plan:
    """The plan of the run in `folder`, whose budget a resumed one keeps. Raises `TightfitError` where there is none."""
    _read(folder / _REQUEST)
    return Plan.load(folder / _PLAN)


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise TightfitError(f"there is no run in `{file.parent}` to go on with", hint="leave out `--resume`") from error
    except ValueError as error:
        raise TightfitError(f"`{file}` is damaged", hint="tune anew, into another folder") from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return f"`{text[:60]}…`" if len(text) > 60 else f"`{text}`"


class _without_model:
    """accelerate saves the optimizer and the random states; what was learned is kept in a form of its own, the base not at all."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._hooks = [
            accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear()),
            accelerator.register_load_state_pre_hook(lambda models, folder: models.clear()),
        ]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
