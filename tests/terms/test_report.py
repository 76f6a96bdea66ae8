"""Report: how far the measurement is off the plan, what it warns of, and JSON both ways."""

import json

import pytest

from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError
from tightfit.terms.plan import Plan
from tightfit.terms.report import Report
from tightfit.terms.workload import Workload

SECONDS = {"load": 1.0, "first_token": 0.5, "per_token": 0.1, "whole": 2.0, "waited": 0.0}


def report(
    measured: int = 1000, run_peak: int = 5000, complete: bool = True, gpu: dict[str, int] | None = None, load_peak: int = 4000
) -> Report:
    """A run that was planned to hold 1000 bytes of tensors (900 of weights), on RAM of 6000 bytes or on a GPU of 3000."""
    budget = Budget(ram=6000, gpu=3000 if gpu else 0)
    predicted = {budget.compute_tier: {"weights": 900, "activations": 100, "overhead": 4000}}
    plan = Plan("m", Workload(), budget, "exact", {}, (budget.compute_tier,), predicted, {}, {})
    parts = {"weights": 900, "activations": measured - 900}
    process = {"load_peak": load_peak, "run_peak": run_peak, "anonymous": 3000, "file": 1000}
    return Report(plan, parts, process, SECONDS, gpu=gpu or {}, tokens=4, complete=complete, text="word")


def test_deviation_leaves_the_overhead_out():
    assert report(1030).deviation == pytest.approx(0.03)
    assert report(940).deviation == pytest.approx(-0.06)


def test_a_kept_word_warns_of_nothing():
    assert report(1000).warnings == ()
    assert report(1049, run_peak=6000, load_peak=6000).warnings == ()
    assert report(951, gpu={"allocated": 2000, "reserved": 3000}).warnings == ()


@pytest.mark.parametrize(("measured", "sign"), [(1060, "+6.0%"), (940, "-6.0%")])
def test_more_than_five_percent_off_is_a_warning(measured, sign):
    (warning,) = report(measured).warnings
    assert sign in warning and "bug" in warning


def test_a_run_that_ended_early_may_take_less_but_not_more():
    assert report(940, complete=False).warnings == ()
    assert len(report(1060, complete=False).warnings) == 1


@pytest.mark.parametrize(
    ("load_peak", "run_peak", "when"),
    [(6000, 6001, "while running"), (6001, 6000, "while loading"), (6001, 6001, "while loading and running")],
)
def test_a_process_over_its_ram_is_a_warning_that_says_when(load_peak, run_peak, when):
    (warning,) = report(load_peak=load_peak, run_peak=run_peak).warnings
    assert "RAM" in warning and f"{when};" in warning and "tightfit probe" in warning


@pytest.mark.parametrize("gpu", [{"allocated": 2000, "reserved": 3001}, {"allocated": 3001, "reserved": 3000}])
def test_a_gpu_over_its_budget_is_a_warning(gpu):
    (warning,) = report(gpu=gpu).warnings
    assert "GPU" in warning


def test_a_report_is_the_same_after_json():
    made = report(1060, gpu={"allocated": 1, "reserved": 2})
    again = Report.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made


def test_json_holds_the_measurement_against_the_plan():
    values = report(1060).to_json()
    assert (values["predicted_peak_bytes"], values["measured_peak_bytes"]) == (1000, 1060)
    assert values["deviation"] == pytest.approx(0.06)
    assert values["warnings"] == list(report(1060).warnings)
    assert values["plan"]["model"] == "m"


@pytest.mark.parametrize("field", ["plan", "measured", "process", "seconds"])
@pytest.mark.parametrize("junk", [None, 5, "junk", [], "absent"])
def test_junk_is_no_report(field, junk):
    values = json.loads(json.dumps(report().to_json())) | {field: junk}
    if junk == "absent":
        del values[field]
    with pytest.raises(TightfitError) as caught:
        Report.from_json(values)
    assert caught.value.hint


@pytest.mark.parametrize("values", [None, 5, [], "x", {}])
def test_what_is_no_report_is_refused(values):
    with pytest.raises(TightfitError, match="not a report"):
        Report.from_json(values)
