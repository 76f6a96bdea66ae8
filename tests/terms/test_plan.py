"""Plan: JSON both ways, what is no plan, and the sums it tells."""

import json
from dataclasses import replace

import pytest

from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError
from tightfit.terms.plan import FORMAT, Plan, TurnedDown
from tightfit.terms.workload import Workload

PLAN = Plan(
    model="llama-2-7b",
    workload=Workload("generate", 1, 100, 20),
    budget=Budget(ram=1 << 34, gpu=1 << 33, disk=5),
    quality="near",
    techniques={"nf4": {"double_quantization": False, "where": "mlp"}, "offload": {"streamed": (1, 3), "slots": 2}},
    residency=("gpu", "ram", "gpu", "disk"),
    predicted={"gpu": {"weights": 50, "overhead": 8}, "ram": {"weights": 9}},
    phases={"load": {"weights": 50}, "decode": {"weights": 50, "kv_cache": 2}},
    seconds={"load": 1.5, "prefill": 0.25, "token": 0.125, "stream": 0.1},
    streamed_bytes=77,
    random_weights=True,
    adapter="learned",
    reasons=("because", "so"),
    turned_down=(TurnedDown(("int8",), "slower"), TurnedDown((), "does not fit")),
    notes=("a note",),
)


SPREAD = replace(
    PLAN,
    budget=replace(PLAN.budget, gpus=3),
    residency=("gpu",) * 4,
    predicted={"gpu": {"weights": 60}},
    devices=(0, 0, 1, 1),
    predicted_gpus=({"weights": 50, "overhead": 8}, {"weights": 60}),
)


def through_json(plan: Plan) -> Plan:
    return Plan.from_json(json.loads(json.dumps(plan.to_json())))


def test_a_plan_is_the_same_after_json():
    assert through_json(PLAN) == PLAN
    assert through_json(SPREAD) == SPREAD
    resident = Plan.all_resident("m", Workload(), 3, {})
    assert through_json(resident) == resident


def test_a_saved_plan_is_the_same(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN.to_json()))
    assert Plan.load(tmp_path / "plan.json") == PLAN


def test_json_tells_the_sums():
    values = PLAN.to_json()
    assert values["format"] == FORMAT
    assert values["predicted_bytes"] == {"gpu": 58, "ram": 9}
    assert values["resting"] == {"gpu": 2, "ram": 1, "disk": 1}


def test_sums_of_the_compute_tier():
    assert (PLAN.compute_tier, PLAN.predicted_bytes("gpu"), PLAN.predicted_bytes("disk")) == ("gpu", 58, 0)
    assert PLAN.tensor_bytes() == 50
    assert replace(PLAN, budget=Budget(ram=1)).compute_tier == "ram"


def test_of_several_gpus_the_fullest_is_told():
    assert (SPREAD.gpus_used, SPREAD.fullest_gpu) == (2, 1)
    assert (PLAN.gpus_used, PLAN.fullest_gpu, replace(PLAN, budget=Budget(ram=1)).gpus_used) == (1, 0, 0)


def test_a_newer_format_is_refused():
    with pytest.raises(TightfitError, match="newer tightfit") as caught:
        Plan.from_json(PLAN.to_json() | {"format": FORMAT + 1})
    assert "upgrade" in caught.value.hint


FIELDS = ["format", *Plan.__dataclass_fields__]
TEXTS = ("model", "quality", "adapter")
DEFAULTED = ("streamed_bytes", "random_weights", "adapter", "devices", "predicted_gpus", "reasons", "turned_down", "notes")
LEGAL = {*((name, "str") for name in TEXTS), ("streamed_bytes", "int"), ("format", "int"), ("techniques", "dict"), ("workload", "dict")}
"""Junk that one cannot tell from a value; a workload has a default for every field."""


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("junk", [None, "junk", 1, {"a": {"b": "c"}}, [None], [["x"]], float("nan")])
def test_a_plan_with_one_field_of_junk_is_refused(field, junk):
    values = json.loads(json.dumps(PLAN.to_json())) | {field: junk}
    if (field, type(junk).__name__) in LEGAL:
        Plan.from_json(values)
    else:
        with pytest.raises(TightfitError, match="not a plan"):
            Plan.from_json(values)


@pytest.mark.parametrize(
    "field",
    [
        "format",
        *(name for name in FIELDS[1:] if name not in DEFAULTED),
    ],
)
def test_a_plan_without_a_field_is_refused(field):
    values = PLAN.to_json()
    del values[field]
    with pytest.raises(TightfitError, match="not a plan"):
        Plan.from_json(values)


def test_a_plan_that_contradicts_itself_is_refused():
    for wrong in ({"predicted": {"ram": {"weights": 9}}}, {"predicted": {"gpu": {}}}, {"residency": ["gpu", "moon", "gpu", "disk"]}):
        with pytest.raises(TightfitError, match="not a plan"):
            Plan.from_json(PLAN.to_json() | wrong)
    few = SPREAD.to_json()["budget"] | {"gpus": 1}
    one = [{"weights": 50}]
    for wrong in ({"devices": [0, 1]}, {"devices": [0, 0, 1, 2]}, {"devices": []}, {"predicted_gpus": one}, {"budget": few}):
        with pytest.raises(TightfitError, match="not a plan"):
            Plan.from_json(SPREAD.to_json() | wrong)


def test_a_field_that_is_not_known_is_passed_over():
    assert Plan.from_json(PLAN.to_json() | {"tomorrow": 1}) == PLAN


@pytest.mark.parametrize("values", [None, 5, "plan", [], {}, [1, 2], {"format": "x"}, {"format": 1}, {"format": None}])
def test_what_is_no_plan_is_refused(values):
    with pytest.raises(TightfitError, match="not a plan") as caught:
        Plan.from_json(values)
    assert "--save" in caught.value.hint


@pytest.mark.parametrize("data", [b"", b"{", b"hello", b"\xff\x00"])
def test_a_file_that_is_not_json_is_refused(tmp_path, data):
    (tmp_path / "plan.json").write_bytes(data)
    with pytest.raises(TightfitError, match="not JSON"):
        Plan.load(tmp_path / "plan.json")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(TightfitError, match=r"cannot read the plan `.*nowhere`"):
        Plan.load(tmp_path / "nowhere")
    with pytest.raises(TightfitError, match="cannot read the plan"):
        Plan.load(tmp_path)
