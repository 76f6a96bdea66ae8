"""Show: plans and reports for people, and what happens with sizes at their limits."""

import io
import itertools
from dataclasses import replace

import pytest
from rich.console import Console

from tightfit.show import show_plan, show_report
from tightfit.terms.budget import Budget
from tightfit.terms.plan import Plan, TurnedDown
from tightfit.terms.report import Report
from tightfit.terms.units import GIB, MIB
from tightfit.terms.workload import Workload

PLAN = Plan(
    model="big",
    workload=Workload("generate", 1, 100, 20),
    budget=Budget(ram=8 * GIB, gpu=2 * GIB, disk=GIB),
    quality="near",
    techniques={"nf4": {}, "offload": {"streamed": (1, 2, 3), "slots": 2}},
    residency=("gpu", "ram", "ram", "disk"),
    predicted={
        "gpu": {"weights": GIB, "kv_cache": 512 * MIB, "overhead": 256 * MIB},
        "ram": {"weights": 3 * GIB, "overhead": GIB},
        "disk": {"weights": GIB},
    },
    phases={},
    seconds={"load": 1.5, "prefill": 0.25, "token": 0.125, "stream": 0.1},
    reasons=("it is [bold]fast[/bold]",),
    turned_down=(TurnedDown(("int8",), "needs 9 GiB"), TurnedDown((), "slower")),
    notes=("[note]",),
)
REPORT = Report(
    plan=PLAN,
    measured={"weights": GIB, "kv_cache": 400 * MIB, "activations": 5 * MIB},
    process={"load_peak": 3 * GIB, "run_peak": 4 * GIB, "anonymous": 3 * GIB, "file": MIB},
    seconds={"load": 2.0, "first_token": 0.5, "per_token": 0.1, "whole": 3.0, "waited": 0.0},
    gpu={"allocated": GIB, "reserved": GIB},
    moved_bytes=7 * GIB,
    tokens=20,
)


def shown(show, value) -> str:
    out = io.StringIO()
    show(value, Console(file=out, width=200, soft_wrap=True))
    return out.getvalue()


def test_each_of_several_gpus_is_shown():
    held = ({"weights": GIB}, {"weights": GIB, "overhead": 512 * MIB})
    spread = {"residency": ("gpu",) * 4, "devices": (0, 1, 1, 1), "predicted_gpus": held}
    lines = shown(show_plan, replace(PLAN, budget=replace(PLAN.budget, gpus=2), **spread)).splitlines()
    assert lines[2].endswith("████  1 on gpu 0, 3 on gpu 1")
    bars = {line.split("■")[0].strip(): after.strip() for line, after in itertools.pairwise(lines) if "■" in line}
    assert bars["gpu 0"] == "1.00 GiB of 2.00 GiB: weights 1.00 GiB"
    assert bars["gpu 1"] == "1.50 GiB of 2.00 GiB: weights 1.00 GiB  overhead 512.0 MiB"
    assert "gpu" not in bars and "ram" in bars


def test_a_plan_is_shown_whole():
    lines = shown(show_plan, PLAN).splitlines()
    assert lines[0] == "big: read 100 tokens, write 20"
    assert "nf4, offload (quality near)" in lines[1]
    assert "█▒▒░  1 on gpu, 2 on ram, 1 on disk" in lines[2]
    text = "\n".join(lines)
    assert "1.75 GiB of 2.00 GiB: weights 1.00 GiB  kv_cache 512.0 MiB  overhead 256.0 MiB" in text
    assert "4.00 GiB of 8.00 GiB" in text and "1.00 GiB of 1.00 GiB" in text
    assert "1.50 s to load, 250.0 ms for the prompt, 125.0 ms a token" in text
    assert "because     it is [bold]fast[/bold]" in text and "note        [note]" in text
    assert "not taken   int8: needs 9 GiB" in text and "not taken   as stored: slower" in text


@pytest.mark.parametrize(("share", "filled"), [(0.0, 0), (0.5, 28), (1.0, 56), (3.0, 56)])
def test_the_bar_is_the_share_of_the_budget(share, filled):
    plan = replace(PLAN, budget=Budget(ram=GIB), predicted={"ram": {"weights": int(share * GIB)}}, residency=("ram",))
    assert shown(show_plan, plan).count("■") == filled
    assert shown(show_plan, plan).count("·") == 56 - filled


def test_a_budget_of_nothing_is_shown():
    assert "of 0 B" in shown(show_plan, replace(PLAN, budget=Budget(ram=0, gpu=GIB)))


def test_many_blocks_are_sampled_to_the_width():
    plan = replace(PLAN, residency=("gpu",) * 63 + ("disk",) * 63)
    assert "█" * 28 + "░" * 28 + "  63 on gpu, 63 on disk" in shown(show_plan, plan)


@pytest.mark.parametrize(("task", "words"), [("tune", "one step over 3 × 100 tokens, adamw"), ("embed", "one pass over 3 × 100 tokens")])
def test_other_tasks_are_told(task, words):
    plan = replace(PLAN, workload=Workload(task, 3, 100), seconds={"load": 1.0, "step": 2.0, "stream": 0.0})
    text = shown(show_plan, plan)
    assert words in text and "2.00 s a step" in text


def test_a_report_holds_every_kind_against_the_plan():
    text = shown(show_report, REPORT)
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "1.00 GiB" in rows["weights"] and "+0.0%" in rows["weights"]
    assert "512.0 MiB" in rows["kv_cache"] and "400.0 MiB" in rows["kv_cache"] and "-21.9%" in rows["kv_cache"]
    assert "activations" in rows
    assert "budget 8.00 GiB" in rows["process"] and "4.00 GiB" in rows["process"]
    assert "7.00 GiB streamed" in text and "100.0 ms a token" in text


def test_a_report_ends_with_its_word_kept_or_its_warnings():
    kept = replace(REPORT, measured={"weights": GIB, "kv_cache": 512 * MIB})
    assert shown(show_report, kept).splitlines()[-1].startswith("kept its word: inside the budget, +0.0% off")
    broken = shown(show_report, replace(REPORT, measured={"weights": 2 * GIB}, process=REPORT.process | {"run_peak": 9 * GIB}))
    assert broken.count("warning: ") == 2 and "kept its word" not in broken
