"""The face: every name that `tightfit` offers is what it says, whatever was imported before it."""

import inspect

import pytest

import tightfit


def test_every_name_is_a_class_or_a_function():
    from tightfit import verbs  # noqa: F401 -- it imports every room

    assert {name for name in tightfit.__all__ if not callable(getattr(tightfit, name))} == set()
    assert all(inspect.getdoc(getattr(tightfit, name)) for name in tightfit.__all__)


def test_a_name_that_is_not_offered_is_said_so():
    with pytest.raises(AttributeError, match="tightfit has no `manager`"):
        tightfit.manager  # noqa: B018


def test_the_main_job_through_the_face_alone():
    plan = tightfit.plan("tightfit-demo", tightfit.Workload(tokens=8, new_tokens=4), tightfit.Budget(ram=1 << 36))
    report = tightfit.run(plan, "The sea", tightfit.Sampling(ignore_eos=True))
    assert report.plan is plan
    assert report.tokens == 4 and report.text
    assert abs(report.deviation) < 0.05
