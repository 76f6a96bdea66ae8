"""Law 6: under a limit that the kernel enforces, a run that was planned to fit finishes; what was refused really does not fit."""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tightfit import verbs
from tightfit.terms.budget import Budget
from tightfit.terms.errors import DoesNotFit
from tightfit.terms.machine import Machine
from tightfit.terms.plan import Plan
from tightfit.terms.units import GIB, MIB
from tightfit.terms.workload import Workload

ROOT = Path(__file__).parents[2]
WORDS = ["--prompt", "The sea was calm", "--max-new-tokens", "24", "--json"]
SPARE = 8 * MIB
"""Between two runs of the same program, Python's own memory differs by some MiB."""

pytestmark = pytest.mark.cgroup


@pytest.fixture(scope="module")
def cgroup():
    """The benchmarks' door to memory cgroups, where the checkout and the kernel have them."""
    file = ROOT / "bench/peers/cgroup.py"
    if not file.exists():
        pytest.skip("the benchmarks are not part of this checkout")
    spec = importlib.util.spec_from_file_location("tightfit_bench_cgroup", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if reason := module.unavailable_reason():
        pytest.skip(reason)
    return module


@pytest.fixture(scope="module")
def limited(cgroup, tmp_path_factory):
    """Run `python ARGUMENTS` under a limit of bytes; the probe's file is one of this module."""
    home = tmp_path_factory.mktemp("home")

    def run(arguments: list[str], limit_bytes: int | None) -> dict[str, object]:
        environment = [f"PYTHONPATH={ROOT / 'src'}", f"TIGHTFIT_HOME={home}", f"TIGHTFIT_SPILL={home}", "OMP_NUM_THREADS=1"]
        return cgroup.run_limited(["/usr/bin/env", *environment, sys.executable, *arguments], limit_bytes, timeout=200)

    run.home = home
    return run


@pytest.fixture(scope="module")
def machine(limited) -> Machine:
    """This machine with its real overhead: what a run of the demo model holds beyond its tensors. Probing the rates is not needed."""
    done = limited(["-m", "tightfit", "run", "tightfit-demo", *WORDS], None)
    assert done["returncode"] == 0, done["stderr"]
    report = done["result"]
    overhead = max(report["process"]["load_peak"], report["process"]["run_peak"]) - report["measured_peak_bytes"]
    found = replace(Machine(), probed=True, overhead_ram=overhead + SPARE, allocator_slack=0.0)
    (limited.home / "machine.json").write_text(json.dumps(vars(found)))
    return found


def test_a_planned_run_finishes_under_its_budget(limited, machine):
    """The demo model streams: its 19 MiB of weights do not fit in the 11 MiB that the budget leaves."""
    budget = machine.overhead_ram + 11 * MIB
    done = limited(["-m", "tightfit", "run", "tightfit-demo", "--ram", str(budget), *WORDS], budget)
    assert done["returncode"] == 0, done["stderr"]
    assert done["oom_kills"] == 0
    report = done["result"]
    assert "offload" in report["plan"]["techniques"]
    assert report["moved_bytes"] > report["plan"]["streamed_bytes"]
    assert max(report["process"]["load_peak"], report["process"]["run_peak"]) <= budget
    assert abs(report["deviation"]) < 0.05


RESIDENT = """
import json, sys
from tightfit.describe.source import describe
from tightfit.runtime.build import build
from tightfit.runtime.generate import Sampling, generate
from tightfit.runtime.tokens import encode
from tightfit.terms.plan import Plan
plan = Plan.from_json(json.load(open(sys.argv[1])))
skeleton = describe(plan.model, random_weights=True)
with build(plan, skeleton) as built:
    print("built", flush=True)
    print(generate(built, encode(skeleton, "The sea was calm"), Sampling(ignore_eos=True)).tokens)
"""


def test_what_was_refused_is_killed(limited, machine, tmp_path):
    """GPT-2 of random weights, 475 MiB: refused at 150 MiB beside the overhead; with the planner left out the kernel ends it."""
    workload, budget = Workload("generate", 1, 4, 8), Budget(ram=machine.overhead_ram + 150 * MIB, disk=4 * GIB)
    with pytest.raises(DoesNotFit):
        verbs.plan("gpt2", workload, budget, random_weights=True, machine=machine)
    plan = replace(Plan.all_resident("gpt2", workload, 12, {}), random_weights=True)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    killed = limited(["-c", RESIDENT, str(tmp_path / "plan.json")], budget.ram)
    assert killed["returncode"] != 0
    assert killed["oom_kills"] >= 1, killed["stderr"]
    assert "Error" not in killed["stderr"] and not killed["timed_out"]
    assert os.listdir(limited.home) == ["machine.json"]
