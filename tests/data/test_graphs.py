"""Graph files: three formats as they are, and one clear line for each fault."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from stories260k import data_folder

from tightfit.data.graphs import graph_values, read_graph
from tightfit.terms.errors import TightfitError
from tightfit.terms.graph import Graph, Operator

PARTITIONING: dict[str, Any] = {
    "maxSizePerFPGA": 1000.0,
    "maxFPGAs": 2,
    "nodes": [
        {"id": 7, "name": "in", "fpgaLatency": 2, "size": 10.5, "colorClass": 3, "isBackwardNode": 0},
        {"id": 9, "fpgaLatency": 0.5, "size": 0, "isBackwardNode": 1, "colorClass": 3},
        {"id": 8, "fpgaLatency": 1.0, "size": 4.0},
    ],
    "edges": [{"sourceId": 7, "destId": 9, "cost": 0.25}, {"sourceId": 7, "destId": 8, "cost": 0.25}],
}

PIPEDREAM = """node1 -- Input -- forward_compute_time=0.0, backward_compute_time=0.0, activation_size=[64.0; 36.0], parameter_size=0.0
node2 -- Linear(4, 2) -- forward_compute_time=2.0, backward_compute_time=3.0, activation_size=50.0, parameter_size=40.0
\tnode1 -- node2
"""


def written(path: Path, values: Any) -> str:
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


def test_partitioning(tmp_path: Path) -> None:
    found = read_graph(written(tmp_path / "g.json", PARTITIONING))
    assert (found.devices, found.memory_bytes, found.ids) == (2, 1000, ("7", "9", "8"))
    assert found.graph.edges == ((0, 1), (0, 2))
    first, second, third = found.graph.operators
    assert first == Operator("in", 0.002, weight_bytes=11, transfer_seconds=0.00025, group="3")
    assert (second.backward, second.group, second.name, second.transfer_seconds) == (True, "3", "9", 0.0)
    assert third.group == ""


def test_pipedream_becomes_a_training_step(tmp_path: Path) -> None:
    graph = read_graph(written(tmp_path / "net.graph.txt", PIPEDREAM)).graph
    assert graph.name == "net"
    given, linear, given_back, linear_back = graph.operators
    assert (given.output_bytes, linear.seconds, linear.weight_bytes, linear.output_bytes) == (100, 0.002, 80, 50)
    assert (linear_back.seconds, linear_back.output_bytes, linear_back.backward, given_back.output_bytes) == (0.003, 100, True, 0)
    assert linear.group == linear_back.group != given.group == given_back.group
    # its backward reads its input (0), its output (1) and hands the gradient of its input back (3 → 2)
    assert set(graph.edges) == {(0, 1), (0, 2), (1, 3), (0, 3), (3, 2)}


def test_our_own_comes_back_as_it_was(tmp_path: Path) -> None:
    graph = Graph("g", (Operator("a", 1.5, 1, 2, 3, 4, group="x"), Operator("b", 0.0, backward=True)), ((0, 1),))
    assert read_graph(written(tmp_path / "g.json", graph_values(graph))).graph == graph


def test_what_may_be_null_or_lead_the_text(tmp_path: Path) -> None:
    nodes = [{"id": at, "fpgaLatency": 1, "size": 1, "colorClass": None, "supportedOnFpga": 1} for at in (1, 2)]
    text = json.dumps({"nodes": nodes, "maxFPGAs": None, "maxSizePerFPGA": None})
    found = read_graph(written(tmp_path / "g.json", "\ufeff" + text))
    assert (found.devices, found.memory_bytes, found.graph.edges) == (None, None, ())
    assert found.graph.groups == ((0,), (1,))


def changed(**values: Any) -> dict[str, Any]:
    return json.loads(json.dumps(PARTITIONING)) | values


def ours(**values: Any) -> dict[str, Any]:
    return {"operators": [{"name": "a", "seconds": 1.0} | values, {"name": "b", "seconds": 2.0}]}


def node(**values: Any) -> dict[str, Any]:
    return {"nodes": [{"id": 1, "fpgaLatency": 1.0, "size": 1.0} | values]}


HUGE = 10**400
FAULTS = [
    ("no graph at all", {"a": 1}, "holds no graph"),
    ("half a file", '{"nodes": [', "not sound JSON"),
    ("no size", changed(nodes=[{"id": 1, "fpgaLatency": 1.0}]), "node 1 lacks size"),
    ("no id", changed(nodes=[{"fpgaLatency": 1.0, "size": 0}]), "node at place 0 lacks id"),
    ("a word for a time", changed(nodes=[{"id": 1, "fpgaLatency": "x", "size": 1}]), "node 1 has fpgaLatency of 'x'"),
    ("time below zero", changed(nodes=[{"id": 1, "fpgaLatency": -1, "size": 1}], edges=[]), "node 1 has fpgaLatency of -1"),
    ("a twin", changed(nodes=[PARTITIONING["nodes"][0]] * 2), "two nodes have one `id`"),
    ("a stranger", changed(nodes=PARTITIONING["nodes"][:2]), "an edge names node 8"),
    ("a circle", changed(edges=[*PARTITIONING["edges"], {"sourceId": 8, "destId": 7, "cost": 0}]), "circle through `in`, `8`|`8`, `in`"),
    ("an edge without cost", changed(edges=[{"sourceId": 7, "destId": 8}]), "edge 0 lacks cost"),
    ("empty", changed(nodes=[]), "an edge names node"),
    ("ours, no time", {"operators": [{"name": "a"}], "edges": []}, "operator 0 lacks seconds"),
    ("ours, misspelt", {"operators": [{"name": "a", "secnds": 1}], "edges": []}, "unknown `secnds`"),
    ("ours, odd edge", {"operators": [{"name": "a", "seconds": 1}], "edges": [[0]]}, "edge 0 is not a pair"),
    ("text, odd line", PIPEDREAM + "what is this\n", "line 4 is neither a layer nor an edge"),
    ("text, missing cost", PIPEDREAM.replace(", parameter_size=40.0", ""), "line 2 lacks parameter_size"),
    ("text, stranger", PIPEDREAM + "\tnode2 -- node5\n", "`node5`, which is not there"),
    ("text, below zero", PIPEDREAM.replace("=50.0", "=-50.0"), "line 2 has activation_size=-50"),
    ("text, too much", PIPEDREAM.replace("=50.0", "=1e300"), r"line 2 has activation_size=1e\+300"),
    ("text, a twin", PIPEDREAM.replace("node2 -- L", "node1 -- L"), "line 2 names layer `node1` again"),
    ("nested too deeply", '{"operators": ' + "[" * 200_000, "not sound JSON"),
    ("nodes are a number", {"nodes": 5}, "`nodes` is not a list"),
    ("edges are text", changed(edges="x"), "`edges` is not a list"),
    ("size is a word", changed(maxSizePerFPGA="1GB"), "the graph has maxSizePerFPGA of '1GB'"),
    ("size is no number", changed(maxSizePerFPGA=math.nan), "the graph has maxSizePerFPGA of nan"),
    ("size below zero", changed(maxSizePerFPGA=-5), "the graph has maxSizePerFPGA of -5"),
    ("size zero", changed(maxSizePerFPGA=0), "the graph has maxSizePerFPGA of 0"),
    ("devices in parts", changed(maxFPGAs=2.0), r"the graph has maxFPGAs of 2\.0"),
    ("devices below zero", changed(maxFPGAs=-2), "the graph has maxFPGAs of -2"),
    ("devices in words", changed(maxFPGAs="x"), "the graph has maxFPGAs of 'x'"),
    ("a colour of two", node(colorClass=[1]), r"node 1 has colorClass of \[1\]"),
    ("backward in words", node(isBackwardNode="no"), "node 1 has isBackwardNode of 'no'"),
    ("for CPUs only", node(supportedOnFpga=0), "node 1 cannot run on an accelerator"),
    ("for CPUs only, in words", node(supportedOnFpga=False), "node 1 cannot run on an accelerator"),
    ("an id that is true", node(id=True), "node True has id of True"),
    ("a name that is a number", node(name=5), "node 1 has name of 5"),
    ("a huge time", node(fpgaLatency=HUGE), "node 1 has fpgaLatency of 10+[.][.][.]"),
    ("ours, operators null", {"operators": None}, "`operators` is not a list"),
    ("ours, operators a number", {"operators": 5}, "`operators` is not a list"),
    ("ours, edges null", ours() | {"edges": None}, "`edges` is not a list"),
    ("ours, no name", ours() | {"name": None}, "the graph has name of None"),
    ("ours, an operator of text", {"operators": ["a"]}, "operator 0 is not an object"),
    ("ours, a name that is a number", ours(name=1), "operator 0 has name of 1"),
    ("ours, bytes in words", ours(output_bytes="4 GB"), "operator 0 has output_bytes of '4 GB'"),
    ("ours, bytes null", ours(weight_bytes=None), "operator 0 has weight_bytes of None"),
    ("ours, bytes that are true", ours(weight_bytes=True), "operator 0 has weight_bytes of True"),
    ("ours, half a byte", ours(kept_bytes=1.5), r"operator 0 has kept_bytes of 1\.5"),
    ("ours, huge bytes", ours(temporary_bytes=HUGE), "operator 0 has temporary_bytes of 10+[.][.][.]"),
    ("ours, a time that is none", ours(seconds=math.nan), "operator 0 has seconds of nan"),
    ("ours, a time of words", ours(transfer_seconds="x"), "operator 0 has transfer_seconds of 'x'"),
    ("ours, a time without end", ours(transfer_seconds=math.inf), "operator 0 has transfer_seconds of inf"),
    ("ours, a group that is a number", ours(group=1), "operator 0 has group of 1"),
    ("ours, a group that is a list", ours(group=[1]), r"operator 0 has group of \[1\]"),
    ("ours, backward in words", ours(backward="no"), "operator 0 has backward of 'no'"),
    ("ours, a twin", ours(name="b"), "2 operators are called `b`"),
]


@pytest.mark.parametrize(("values", "line"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_faults_are_one_line(tmp_path: Path, values: Any, line: str) -> None:
    with pytest.raises(TightfitError, match=line) as caught:
        read_graph(written(tmp_path / "g.json", values))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 200


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(TightfitError, match=r"cannot read `nowhere\.json`"):
        read_graph("nowhere.json")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "g.json").write_bytes(b"\xff\xfe\x00\x93")
    with pytest.raises(TightfitError, match="is not text"):
        read_graph(str(tmp_path / "g.json"))


GRAPHS = data_folder() / "graphs"


@pytest.mark.realdata
@pytest.mark.skipif(not GRAPHS.exists(), reason=f"no graphs in {GRAPHS}: set `TIGHTFIT_DATA`")
def test_every_real_file_reads() -> None:
    files = [*GRAPHS.glob("dnn-partitioning/*-inputs/*/*.json"), *GRAPHS.glob("pipedream/*.graph.txt")]
    graphs = [read_graph(str(file)).graph for file in files]
    assert len(graphs) >= 32
    assert all(graph.seconds > 0 and graph.weight_bytes > 0 for graph in graphs)
