"""QST: its sentence is the paper's, and what it says of QLoRA's memory is what QLoRA then takes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tightfit.recipes import Told
from tightfit.recipes.qst import planned_peak, run
from tightfit.terms.budget import Budget
from tightfit.terms.tuning import Tuning
from tightfit.verbs.tuning import read_lesson, tune

MODEL = "tightfit-demo"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Samples of one length, so that every step takes what was planned."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    file.write_text(json.dumps({"instruction": "Count to 12.", "output": " ".join(map(str, range(1, 13)))}) + "\n")
    file.write_text(file.read_text() * 8)
    return str(file)


@pytest.fixture(scope="module")
def ran(data, tmp_path_factory):
    """Three steps of the recipe as it is: the report, what was told in its order, and the folder."""
    out, said = tmp_path_factory.mktemp("runs") / "out", []
    told = Told(
        reading=lambda done, whole: said.append(("reading", done == whole)),
        planned=lambda plan: said.append(("planned", plan)),
        loading=lambda done, whole: said.append(("loading", done)),
        learning=lambda done, whole, loss: said.append(("learning", done)),
        finding=lambda line: said.append(("finding", line)),
    )
    report = run(MODEL, data, str(out), held_out=data, steps=3, ram="64GiB", disk="1GiB", told=told)
    return report, said, out


def test_the_settings_are_the_papers(ran):
    report, _, out = ran
    work = report.plan.workload
    assert (work.batch, work.precision, work.optimizer) == (4, "bf16", "adamw")
    asked = json.loads((out / "request.json").read_text())
    assert asked["setting `learning_rate`"] == 2e-4 and asked["setting `schedule`"] == "constant"
    assert asked["setting `epochs`"] == 3.0 and asked["setting `steps`"] == 3
    note = json.loads((out / "tightfit.json").read_text())
    assert note["technique"] == "side"
    assert {name: note["settings"][name] for name in ("reduction", "downsample", "rank")} == {
        "reduction": 16,
        "downsample": "adapter",
        "rank": 16,
    }
    assert report.plan.techniques["nf4"] == {"layout": "standard"}, "in which scales rest in 8 bits too"
    assert report.scores["steps"] == 3 and {"held_out_loss_before", "held_out_loss"} <= report.scores.keys()


def test_everything_is_told_in_its_order(ran):
    report, said, _ = ran
    order = [name for at, (name, _) in enumerate(said) if at == 0 or said[at - 1][0] != name]
    assert order == ["reading", "planned", "loading", "learning", "finding"]
    assert dict(said)["planned"] == report.plan
    assert [value for name, value in said if name == "learning"] == [1, 2, 3]


def test_what_it_says_of_both_is_what_both_take(ran, data, tmp_path):
    """QLoRA is really tuned here, for two steps."""
    report, said, _ = ran
    side, low_rank = report.scores["side_peak_bytes"], report.scores["qlora_peak_bytes"]
    assert report.measured_bytes == pytest.approx(side, rel=0.02)
    settings = {"rank": 64, "alpha": 16.0, "dropout": 0.1}
    planned = replace(report.plan, techniques={"nf4": {"layout": "standard"}, "chunked_loss": {}, "lora": settings})
    tuning = Tuning(steps=2)
    qlora = tune(planned, read_lesson(MODEL, data, 384, tuning), str(tmp_path / "qlora"), tuning)
    assert qlora.measured_bytes == pytest.approx(low_rank, rel=0.02)
    assert side < low_rank / 2
    assert f"{low_rank / side:.2f} times as much" in said[-1][1]


def test_the_comparison_has_the_runs_rows_and_not_its_way_out_of_a_small_budget(ran):
    report, _, _ = ran
    plan, work = report.plan, report.plan.workload
    streamed = {**plan.techniques, "recompute": {}, "offload": {"streamed": (0, 1), "slots": 2}}
    assert planned_peak(replace(plan, budget=Budget(1), techniques=streamed), "side") == report.scores["side_peak_bytes"]
    split = replace(plan, workload=replace(work, batch=8, micro_batch=1))
    assert planned_peak(split, "side") < report.scores["side_peak_bytes"]


def test_only_the_side_is_left_in_the_folder(ran):
    _, _, out = ran
    names = {path.name for path in Path(out).iterdir()}
    assert {"side_config.json", "side_model.safetensors", "log.jsonl"} <= names
    assert not any(name.startswith("adapter") for name in names)
