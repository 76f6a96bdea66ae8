"""Contiguous: the dynamic program and its search against every split that flows one way; the graphs of dnn-partitioning."""

import json
import math
import os
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from pipelines import cluster_of, clusters, fits, flows_one_way, graphs, least, plain_load, quick

from tightfit.data.graphs import read_graph
from tightfit.planner.placement.atoms import stage_atoms
from tightfit.planner.placement.contiguous import contiguous
from tightfit.planner.placement.ideals import all_ideals, linear_orders, prefixes
from tightfit.planner.placement.load import load
from tightfit.planner.placement.load_bounds import load_bound
from tightfit.planner.placement.splitting import best_split, kinds_of
from tightfit.terms.cluster import Cluster, Link
from tightfit.terms.graph import Graph, Operator


@settings(deadline=None, max_examples=40)
@given(graphs(), clusters())
def test_contiguous_fits_flows_one_way_and_is_above_its_bound(graph: Graph, cluster: Cluster) -> None:
    found, best = contiguous(graph, cluster), least(graph, cluster, one_way=True)
    if found is None:
        return
    assert fits(graph, cluster, found.device_of) and flows_one_way(graph, found.device_of)
    assert found.seconds == pytest.approx(max(plain_load(graph, cluster, found.device_of)))
    assert found.bound_seconds - 1e-9 <= best <= found.seconds + 1e-9


@quick
@given(graphs(outputs=False), clusters())
def test_contiguous_is_the_best_of_all_that_flow_one_way(graph: Graph, cluster: Cluster) -> None:
    """Where what a stage holds is a sum, nothing is left to chance."""
    found, best = contiguous(graph, cluster), least(graph, cluster, one_way=True)
    assert (found is None) == (best == math.inf)
    assert found is None or (found.optimal and found.seconds == pytest.approx(best))
    atoms = stage_atoms(graph, cluster)
    ideals = all_ideals(atoms, 1 << 20) or []
    split = best_split(atoms, ideals, kinds_of(cluster), best * 1.000001 + 1e-6 if found else 1e9, math.inf)
    assert (split is None) == (found is None) and (split is None or split.seconds == pytest.approx(best)), "no cut is left out too soon"


def test_contiguous_says_that_it_is_optimal() -> None:
    graph = Graph("chain", tuple(Operator(str(at), float(at % 3 + 1), 1, output_bytes=1) for at in range(8)), tuple(pairwise(range(8))))
    found = contiguous(graph, cluster_of(100, 100, 100))
    assert found is not None and found.optimal and found.seconds == pytest.approx(least(graph, cluster_of(100, 100, 100), one_way=True))
    assert not contiguous(graph, cluster_of(100, 100, 100), most_ideals=3).optimal  # type: ignore[union-attr]


@quick
@given(graphs(outputs=False), clusters())
def test_around_the_cuts_when_ideals_are_too_many(graph: Graph, cluster: Cluster) -> None:
    """The local search is no better than the best, and one that does not fit is not returned."""
    found, best = contiguous(graph, cluster, most_ideals=0), least(graph, cluster, one_way=True)
    assert found is None or (fits(graph, cluster, found.device_of) and flows_one_way(graph, found.device_of))
    assert found is None or found.bound_seconds - 1e-9 <= best <= found.seconds + 1e-9


def test_around_the_cuts_finds_the_best_of_two_lanes() -> None:
    """Two chains side by side, whose 25 ideals are too many."""
    work = (3.0, 5.0, 2.0, 6.0), (4.0, 7.0, 1.0, 3.0)
    operators = tuple(Operator(str(at), seconds, transfer_seconds=0.1) for at, seconds in enumerate(work[0] + work[1]))
    graph, cluster = Graph("lanes", operators, (*pairwise(range(4)), *pairwise(range(4, 8)))), cluster_of(1, 1, 1)
    found = contiguous(graph, cluster, most_ideals=24)
    assert found is not None and not found.optimal and found.seconds == pytest.approx(least(graph, cluster, one_way=True))


def test_one_linear_order_is_split_exactly() -> None:
    """Against all ways to cut a chain of unlike work, with memory that forbids the most even one."""
    work, weights = (5.0, 1.0, 4.0, 2.0, 6.0, 3.0), (1, 1, 5, 1, 1, 5)
    operators = tuple(
        Operator(str(at), seconds, size, transfer_seconds=0.25) for at, (seconds, size) in enumerate(zip(work, weights, strict=True))
    )
    graph, cluster = Graph("chain", operators, tuple(pairwise(range(6)))), cluster_of(7, 7, 7)
    best = math.inf
    for one in range(7):
        for two in range(one, 7):
            parts = [range(0, one), range(one, two), range(two, 6)]
            if all(sum(weights[at] for at in part) <= 7 for part in parts):
                ends = [(0 < part.start < 6) + (0 < part.stop < 6) if len(part) else 0 for part in parts]
                best = min(best, max(sum(work[at] for at in part) + 0.25 * end for part, end in zip(parts, ends, strict=True)))
    atoms = stage_atoms(graph, cluster)
    split = best_split(atoms, prefixes(range(6)), kinds_of(cluster), 100.0, math.inf)
    assert split is not None and split.seconds == pytest.approx(best)
    assert best_split(atoms, prefixes(range(6)), kinds_of(cluster), best, math.inf) is None


def test_many_unlike_devices() -> None:
    """More states than all orders of nine unlike devices: some orders are tried, and the best chain of work is still split to measure."""
    graph = Graph("chain", tuple(Operator(str(at), 1.0, 1) for at in range(90)), tuple(pairwise(range(90))))
    cluster = cluster_of(*range(100, 109), speeds=tuple(float(at) for at in range(1, 10)))
    found = contiguous(graph, cluster)
    assert found is not None and fits(graph, cluster, found.device_of) and flows_one_way(graph, found.device_of)
    assert found.seconds == pytest.approx(2.0) == 90 / sum(range(1, 10))


def test_links_decide_which_of_two_like_devices() -> None:
    """The slow link is left alone: stages swap devices until it is."""
    graph = Graph("chain", tuple(Operator(str(at), 2.0, 1, output_bytes=1) for at in range(3)), tuple(pairwise(range(3))))
    links = {(0, 1): Link(0.5), (1, 0): Link(0.5)}
    cluster = Cluster(cluster_of(3, 3, 3).devices, Link(2.0), links)
    found = contiguous(graph, cluster)
    assert found is not None and not found.optimal and found.seconds == 3.0 == max(load(graph, cluster, found.device_of))


def test_a_graph_of_thousands_is_cut_in_pieces() -> None:
    chance = random.Random(0)
    operators = tuple(Operator(str(at), chance.uniform(0.5, 1.5), transfer_seconds=0.01) for at in range(4000))
    edges = tuple((at - back, at) for at in range(4000) for back in {1, chance.randint(1, 9)} if at >= back)
    graph, cluster = Graph("long", operators, edges), cluster_of(1, 1, 1, 1)
    found = contiguous(graph, cluster, seconds_limit=2.0)
    assert found is not None and flows_one_way(graph, found.device_of)
    assert found.seconds < 1.01 * graph.seconds / 4


GRAPHS = Path(os.environ.get("TIGHTFIT_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data") / "graphs" / "dnn-partitioning"
FILES = sorted(GRAPHS.glob("throughput-inputs/*/*.json"))


def expert_loads(file: Path) -> list[float] | None:
    """The loads of the human expert's split; a backward goes with its group."""
    folder, read = GRAPHS / "human-experts", read_graph(str(file))
    names = [f"{file.stem}_expert.json", f"{file.stem.replace('training', 'inference')}_expert.json"]
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is None or file.parent.name != "LayerGraphs":
        return None
    stages = json.loads(found.read_text())["fpgas"]
    home = {str(node): number for number, stage in enumerate(stages) for node in stage["nodes"]}
    group = {operator.group: home[name] for name, operator in zip(read.ids, read.graph.operators, strict=True) if name in home}
    device_of = tuple(home.get(name, group[operator.group]) for name, operator in zip(read.ids, read.graph.operators, strict=True))
    return plain_load(read.graph, cluster_of(*[read.memory_bytes or 0] * len(stages)), device_of)


@pytest.mark.realdata
@pytest.mark.skipif(not FILES, reason=f"no graphs in {GRAPHS}: set `TIGHTFIT_DATA`")
@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_real_graphs_are_split_optimally_and_no_worse_than_by_experts(file: Path) -> None:
    read = read_graph(str(file))
    assert read.devices and read.memory_bytes
    cluster = cluster_of(*[read.memory_bytes] * read.devices)
    found, expert = contiguous(read.graph, cluster, seconds_limit=30.0), expert_loads(file)
    assert found is not None and found.optimal and fits(read.graph, cluster, found.device_of)
    assert flows_one_way(read.graph, found.device_of, turned=file.parent.name == "OperatorGraphs"), "LayerGraphs write both parts alike"
    assert found.seconds == pytest.approx(max(plain_load(read.graph, cluster, found.device_of)))
    assert load_bound(stage_atoms(read.graph, cluster), cluster)[0] <= found.seconds
    assert expert is None or found.seconds < 0.9 * max(expert)
    atoms = stage_atoms(read.graph, cluster)
    for order in linear_orders(atoms):
        assert (
            best_split(stage_atoms(read.graph, cluster), prefixes(order), kinds_of(cluster), found.seconds * (1 - 1e-9), math.inf) is None
        )


def test_there_are_experts_to_compare_with() -> None:
    if FILES:
        assert sum(expert_loads(file) is not None for file in FILES) == 6
