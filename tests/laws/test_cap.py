"""Law 6: under a limit that the kernel enforces, a run that was planned to fit finishes; in less than the planner takes it does not."""

import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from planning import planned

from tightfit.describe.source import describe
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

    run.home, run.mapped_bytes = home, 0
    return run


@pytest.fixture(scope="module")
def machine(limited) -> Machine:
    """This machine with its real overhead: what a run of the demo model holds beyond its tensors. Probing the rates is not needed."""
    done = limited(["-m", "tightfit", "run", "tightfit-demo", *WORDS], None)
    assert done["returncode"] == 0, done["stderr"]
    report = done["result"]
    overhead = max(report["process"]["load_peak"], report["process"]["run_peak"]) - report["measured_peak_bytes"]
    found = replace(Machine(), probed=True, overhead_ram=overhead + SPARE, allocator_slack=0.0)
    limited.mapped_bytes = report["process"]["file"]
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


@pytest.fixture(scope="module")
def least(machine) -> Plan:
    """GPT-2 with random weights, 475 MiB, in the least RAM that the planner takes for it, found by bisection; all blocks stream."""
    skeleton, workload = describe("gpt2", random_weights=True), Workload("generate", 1, 4, 8)

    def accepted(ram: int) -> Plan | None:
        try:
            return planned(workload, ram, disk=4 * GIB, names=["offload"], model=skeleton, machine=machine, random_weights=True)
        except DoesNotFit:
            return None

    too_little, enough = machine.overhead_ram, machine.overhead_ram + GIB
    while enough - too_little > MIB // 4:
        middle = (too_little + enough) // 2
        too_little, enough = (too_little, middle) if accepted(middle) else (middle, enough)
    plan = accepted(enough)
    assert set(plan.techniques) == {"offload"} and set(plan.residency) == {"disk"}
    return plan


@pytest.fixture
def run_within(limited, tmp_path):
    """Run a plan under a limit that counts no mapped files: the kernel charges libraries to whoever read them first."""

    def run(plan: Plan, ram: int) -> dict[str, object]:
        (tmp_path / "plan.json").write_text(json.dumps(replace(plan, budget=replace(plan.budget, ram=ram)).to_json()))
        return limited(["-m", "tightfit", "run", "--plan", str(tmp_path / "plan.json"), *WORDS[:2], "--json"], ram - limited.mapped_bytes)

    return run


def test_a_run_in_the_least_that_is_accepted_finishes(run_within, least):
    done = run_within(least, least.budget.ram)
    assert done["returncode"] == 0, done["stderr"]
    assert (done["oom_kills"], done["result"]["warnings"]) == (0, [])
    assert done["result"]["tokens"] == least.workload.new_tokens
    assert done["result"]["moved_bytes"] > least.streamed_bytes > 300 * MIB


def test_a_run_in_less_is_killed(run_within, limited, machine, least):
    """What the planner refuses really does not fit: with a tenth less than it asks beside the overhead, the kernel ends the run."""
    killed = run_within(least, least.budget.ram - (least.budget.ram - machine.overhead_ram) // 10)
    assert killed["returncode"] != 0
    assert killed["oom_kills"] >= 1, killed["stderr"]
    assert "Error" not in killed["stderr"] and not killed["timed_out"]
    assert os.listdir(limited.home) == ["machine.json"], "the spill file has no name, so not even a killed run leaves it behind"
