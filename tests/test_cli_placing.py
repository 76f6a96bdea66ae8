"""The command line's `place`: what it says of a graph file, and its one clear line for every fault."""

import json

import pytest

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
