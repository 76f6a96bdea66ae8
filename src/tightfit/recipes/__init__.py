"""Recipes: one paper each, said in the words of the house. A recipe composes what other rooms have; its settings are the paper's.

It is a file with one function, `run(model, data, output, …, told) -> Report | QuantizeReport`. What stands behind each setting is its help.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tightfit.terms.budget import Budget
from tightfit.terms.plan import Plan
from tightfit.terms.quantizing import QuantizePlan


def _nobody(*_: Any) -> None:
    """Who listens where nobody does."""


@dataclass(frozen=True)
class Told:
    """Who is told how a recipe goes. It is no setting: the command line gives its own, Python users may."""

    reading: Callable[[int, int], None] = _nobody  # samples encoded, of all
    planned: Callable[[Plan | QuantizePlan], None] = _nobody  # before a weight is read
    loading: Callable[[int, int], None] = _nobody  # bytes of weights placed, of all
    learning: Callable[[int, int, float], None] = _nobody  # steps made, of all, loss
    solving: Callable[[int, int, str], None] = _nobody  # layers in few bits, of all, the last one's path
    scoring: Callable[[int, int], None] = _nobody  # tokens scored, of all
    finding: Callable[[str], None] = _nobody  # a line on what was found, as soon as it is


SILENT = Told()


def budget_of_run(output: str, resume: bool, gpu: str | None, ram: str | None, disk: str | None) -> Budget:
    """The budget from texts such as `6GiB`; a run that goes on keeps its own where none is given."""
    from tightfit.verbs.tuning import plan_of

    return plan_of(output).budget if resume and not (gpu or ram or disk) else Budget.parse(gpu, ram, disk)
