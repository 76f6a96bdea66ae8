"""The face: every name that `tightfit` offers is what it says, whatever was imported before it."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tightfit

SRC = Path(__file__).parents[1] / "src"


def test_every_name_is_a_class_or_a_function():
    from tightfit import verbs  # noqa: F401 -- it imports every room

    assert {name for name in tightfit.__all__ if not callable(getattr(tightfit, name))} == set()
    assert all(inspect.getdoc(getattr(tightfit, name)) for name in tightfit.__all__)


def test_a_name_that_is_not_offered_is_said_so():
    with pytest.raises(AttributeError, match="tightfit has no `manager`"):
        tightfit.manager  # noqa: B018


def test_the_readme_job_in_python():
    """Plan, run and report in a fresh process, through the face alone."""
    code = (
        "import json, tightfit; plan = tightfit.plan('tightfit-demo', tightfit.Workload(tokens=8, new_tokens=4), tightfit.Budget(ram=1 << 34));"
        "report = tightfit.run(plan, 'The sea'); print(json.dumps([report.tokens, report.deviation, report.plan == plan]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    tokens, deviation, same = json.loads(done.stdout)
    assert 1 <= tokens <= 4 and abs(deviation) < 0.05 and same
