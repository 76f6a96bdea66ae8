"""The command line's `place`: what it says of a graph file, and its one clear line for every fault."""

import json

import pytest

from tightfit.terms.errors import TightfitError

GRAPH = {
    "nodes": [
        {"id": 10, "fpgaLatency": 4.0, "size": 600},
        {"id": 20, "fpgaLatency": 3.0, "size": 600},
        {"id": 30, "fpgaLatency": 3.0, "size": 300},
        {"id": 40, "fpgaLatency": 1.0, "size": 100},
    ],
    "edges": [
        {"sourceId": 10, "destId": 20, "cost": 0.5},
        {"sourceId": 10, "destId": 30, "cost": 0.5},
        {"sourceId": 20, "destId": 40, "cost": 0.5},
        {"sourceId": 30, "destId": 40, "cost": 0.5},
    ],
}


@pytest.fixture
def placed(tightfit_says, tmp_path):
    def call(*more, graph=GRAPH):
        (tmp_path / "graph.json").write_text(graph if isinstance(graph, str) else json.dumps(graph))
        return tightfit_says("place", "--graph", tmp_path / "graph.json", *more)

    return call


def test_a_step_is_placed_and_told(placed):
    found = json.loads(placed("--devices", 2, "--memory", 2000, "--json").out)
    # both readers of 10 run at once, one of them elsewhere, where 40 runs too: 4 + 0.5 + 3 + 1 = 8.5 ms; on one device it would be 11
    assert found["makespan_seconds"] == pytest.approx(0.0085)
    assert found["bound_seconds"] <= 0.0085 and found["objective"] == "makespan"
    homes = found["assignment"]
    assert set(homes) == {"10", "20", "30", "40"} and homes["20"] != homes["30"]
    assert sum(device["operators"] for device in found["devices"]) == 4
    assert all(device["peak_bytes"] <= 2000 == device["memory_bytes"] for device in found["devices"])


def test_throughput_balances_the_loads(placed):
    found = json.loads(placed("--devices", "2x2000", "--objective", "throughput", "--json").out)
    # 10 | 20, 30, 40: 4 + 0.5 and 0.5 + 7; 10, 20 | 30, 40: 7 + 1 and 1 + 4; 10, 30 | …: alike. The least largest load is 7.5
    assert found["largest_load_seconds"] == pytest.approx(0.0075)
    assert found["seconds"] == found["largest_load_seconds"]


def test_people_see_devices_loads_and_what_was_tried(placed):
    said = placed("--devices", "2x2000B")
    assert said.code == 0
    assert "4 operators on 2 devices" in said.out and "a step takes 8.5 ms" in said.out
    assert "device 1" in said.out and "tried" in said.out and "m-ETF" in said.out


def test_the_report_is_kept(placed, tmp_path):
    assert placed("--devices", "2x2000", "--save-report", tmp_path / "placed.json").code == 0
    assert json.loads((tmp_path / "placed.json").read_text())["makespan_seconds"] == pytest.approx(0.0085)


def test_a_picture_is_drawn(placed, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("step.svg", "step.png"):
        assert placed("--devices", "2x2000", "--picture", tmp_path / name).code == 0
        assert (tmp_path / name).stat().st_size > 3000


def changed(position, **values):
    nodes = [node | values if number == position else node for number, node in enumerate(GRAPH["nodes"])]
    return GRAPH | {"nodes": nodes}


FAULTS = [
    ("no devices", (), GRAPH, "on which devices?"),
    ("no memory", ("--devices", 2), GRAPH, "of what memory?"),
    ("weights over all", ("--devices", "2x700"), GRAPH, r"200 B"),
    ("one over every device", ("--devices", "4x500"), GRAPH, r"`10`|100 B"),
    ("a circle", ("--devices", "2x2000"), GRAPH | {"edges": [*GRAPH["edges"], {"sourceId": 40, "destId": 10, "cost": 1}]}, "circle"),
    ("no size", ("--devices", "2x2000"), GRAPH | {"nodes": [{"id": 1, "fpgaLatency": 1}]}, "node 1 lacks size"),
    ("cost below zero", ("--devices", "2x2000"), changed(0, fpgaLatency=-4), "fpgaLatency of -4"),
    ("no such device", ("--devices", "2x2000", "--link", "0-5=1GB/s"), GRAPH, "names device 5"),
    ("no such objective", ("--devices", "2x2000", "--objective", "makespam"), GRAPH, "no objective is called `makespam`"),
    ("half a file", ("--devices", "2x2000"), '{"nodes": [', "not sound JSON"),
    ("an odd picture", ("--devices", "2x2000", "--picture", "step.doc"), GRAPH, "is no picture"),
    ("a link that nobody reads", ("--devices", "2x2000", "--link", "1MB/s"), GRAPH, "`--link`: the graph's file tells the seconds"),
    ("a latency too", ("--devices", "2x2000", "--link", "1MB/s", "--latency", 5), GRAPH, "`--link`, `--latency`: the graph's file"),
    ("two memories", ("--devices", "2x1GB", "--memory", "2GB"), GRAPH, "`2x1GB` tells the sizes"),
    ("a task of a graph", ("--devices", "2x2000", "--task", "embed"), GRAPH, "`--task`: only for a model"),
    ("shapes of a graph", ("--devices", "2x2000", "--batch", 1, "--context", 9), GRAPH, "`--batch`, `--context`: only for a model"),
    ("a grain of a graph", ("--devices", "2x2000", "--grain", "dust"), GRAPH, "`--grain`: only for a model"),
    ("a map of a graph", ("--devices", "2x2000", "--device-map", "m.json"), GRAPH, "`--device-map`: only for a model"),
    ("a count that is no size", ("--devices", 5000), GRAPH, "`5000` is no device"),
    ("latency without end", ("--devices", "2x2000", "--latency", "inf"), GRAPH, "a latency of inf"),
    ("a model beside a graph", ("gpt2", "--devices", "2x2000"), GRAPH, "not both"),
]


@pytest.mark.parametrize(("more", "graph", "line"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_faults_are_one_line_and_a_hint(placed, more, graph, line):
    import re

    said = placed(*more, graph=graph)
    assert said.code == 1 and said.out == ""
    assert re.search(line, said.err) and "error:" in said.err
    assert "Traceback" not in said.err


def test_nothing_to_place(tightfit_says):
    said = tightfit_says("place")
    assert said.code == 1 and "place what?" in said.err and "hint:" in said.err


def test_a_models_blocks_are_placed_beside_what_cuda_keeps(tightfit_says, tmp_path):
    file = tmp_path / "map.json"
    said = tightfit_says("place", "llama-3.2-1b", "--devices", "2x2GiB", "--context", 64, "--seconds", 0, "--device-map", file)
    assert said.code == 0
    assert "0-" in said.out and "600.0 MiB of each device are left to CUDA" in said.out and "which is a guess" in said.out
    homes = json.loads(file.read_text())
    assert homes["lm_head"] == homes["model.embed_tokens"]  # one tensor
    assert {homes[f"model.layers.{block}"] for block in range(16)} == {0, 1}


def test_a_pipeline_may_hold_a_tied_weight_twice(tightfit_says, tmp_path):
    asked = ("place", "llama-3.2-1b", "--devices", "2x8GiB", "--context", 64, "--objective", "throughput", "--seconds", 1, "--json")
    free = json.loads(tightfit_says(*asked).out)
    assert free["device_map"] is None
    assert free["block_devices"] == sorted(free["block_devices"]) and set(free["block_devices"]) == {0, 1}
    bound = json.loads(tightfit_says(*asked, "--device-map", tmp_path / "map.json").out)
    assert bound["device_map"] is not None
    assert free["largest_load_seconds"] < 0.7 * bound["largest_load_seconds"]  # a circle from the embedding to the head is one stage


def test_devices_too_small_for_cuda_itself_are_told(tightfit_says):
    said = tightfit_says("place", "llama-3.2-1b", "--devices", "2x500MB")
    assert said.code != 0 and "needs 600.0 MiB for itself" in said.err and "\n" in said.err


@pytest.mark.parametrize("more", [("--latency", "0.5"), ("--serial",)])
def test_slower_links_make_a_longer_step(placed, more):
    """Two readers, each on a device of its own: one channel sends to them in turn."""
    operators = [{"name": name, "seconds": 1.0, "weight_bytes": 600, "output_bytes": 100} for name in "abc"]
    graph = json.dumps({"operators": operators, "edges": [[0, 1], [0, 2]]})
    asked = ("--devices", "3x1000B", "--link", "100B/s", "--seconds", 0, "--json")
    plain, slow = (json.loads(placed(*asked, *options, graph=graph).out)["makespan_seconds"] for options in ((), more))
    assert plain == pytest.approx(3.0)
    assert slow == pytest.approx(3.5 if "--latency" in more else 4.0)


def test_what_can_change_something_is_not_refused(placed):
    """A bare count beside a size takes `--memory`, and an operator without a time of transfer takes the link."""
    assert placed("--devices", "1x1000,1", "--memory", 2000, "--seconds", 0).code == 0
    operators = [{"name": "a", "seconds": 1, "transfer_seconds": 1}, {"name": "b", "seconds": 1}]
    graph = {"operators": operators, "edges": [[0, 1]]}
    assert placed("--devices", "2x2000", "--link", "1MB/s", "--latency", 1, "--seconds", 0, graph=graph).code == 0


def test_serial_says_what_it_leaves_as_it_is(placed):
    said = placed("--devices", "2x2000", "--objective", "throughput", "--serial", "--seconds", 0, "--json")
    assert said.code == 0 and "loads" in said.err and json.loads(said.out)
    assert "loads" not in placed("--devices", "2x2000", "--serial", "--seconds", 0).err


def test_two_answers_in_one_file_are_refused(placed, tmp_path):
    file, other = tmp_path / "a.svg", f"{tmp_path}/./a.svg"
    said = placed("--devices", "2x2000", "--picture", file, "--save-report", other)
    assert said.code == 1 and "one file" in said.err and not file.exists()


def test_the_map_is_of_whole_blocks(tightfit_says, tmp_path):
    said = tightfit_says("place", "gpt2", "--devices", "2x8GiB", "--grain", "module", "--device-map", tmp_path / "map.json")
    assert said.code == 1 and "whole blocks" in said.err


@pytest.mark.parametrize(("option", "word"), [("task", "tuen"), ("grain", "blok"), ("objective", "speed")])
def test_a_word_that_is_none_is_told_before_the_model_is_recorded(tightfit_says, monkeypatch, option, word):
    monkeypatch.setattr("tightfit.verbs.placing.place_model", lambda *_: pytest.fail("recorded"))
    said = tightfit_says("place", "gpt2", "--devices", "2x8GiB", f"--{option}", word)
    assert said.code == 1 and f"no {option} is called `{word}`" in said.err


def test_files_are_kept_where_nobody_reads_on(placed, tightfit_says, tmp_path, monkeypatch):
    """`tightfit place … | head -1`."""

    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr("tightfit.cli.placing.emit", closed)
    assert placed("--devices", "2x2000", "--save-report", tmp_path / "placed.json").code == 141
    assert json.loads((tmp_path / "placed.json").read_text())["operators"] == 4
    asked = ("place", "tightfit-demo", "--devices", "2x2GiB", "--context", 16, "--seconds", 0)
    assert tightfit_says(*asked, "--device-map", tmp_path / "map.json").code == 141
    assert json.loads((tmp_path / "map.json").read_text()) == {"": 0}  # all on one


def test_a_picture_that_fails_loses_nothing_else(placed, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def full(_, file):
        raise TightfitError(f"cannot write `{file}`: no space left")

    monkeypatch.setattr("tightfit.picture.draw_schedule", full)
    said = placed("--devices", "2x2000", "--picture", tmp_path / "p.svg", "--save-report", tmp_path / "placed.json")
    assert said.code == 1 and "no space left" in said.err and "a step takes 8.5 ms" in said.out
    assert json.loads((tmp_path / "placed.json").read_text())["operators"] == 4
