"""Ideals: all of them against every closed set, what lies between two against plain loads, folding against brute force."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import cluster_of, flows_one_way, graphs, least, plain_load, quick

from tightfit.planner.placement.atoms import Atoms, join, stage_atoms
from tightfit.planner.placement.family import family
from tightfit.planner.placement.folding import coarse, fold
from tightfit.planner.placement.ideals import all_ideals, along, closures, linear_orders, nearby, prefixes
from tightfit.planner.placement.load import held_bytes
from tightfit.planner.placement.narrowest import narrowest, narrowest_ideals
from tightfit.planner.placement.rebalance import Loads
from tightfit.terms.graph import Graph, Operator


def closed(atoms: Atoms, ideal: int) -> bool:
    return all(ideal >> source & 1 for atom in range(len(atoms.members)) if ideal >> atom & 1 for source in atoms.follows[atom])


@quick
@given(graphs())
def test_ideals_are_all_closed_sets(graph: Graph) -> None:
    atoms = stage_atoms(graph, cluster_of(1))
    every = {ideal for ideal in range(1 << len(atoms.members)) if closed(atoms, ideal)}
    found = all_ideals(atoms, 1 << 20)
    assert found is not None and len(found) == len(every) and set(found) == every
    assert all_ideals(atoms, len(every)) is not None and all_ideals(atoms, len(every) - 1) is None
    behind, ahead = closures(atoms)
    for order in linear_orders(atoms):
        assert sorted(order) == list(range(len(atoms.members)))
        assert set(prefixes(order)) <= every
        assert set(nearby(prefixes(order)[1], behind, ahead, range(len(order)))) <= every


@quick
@given(graphs())
def test_loads_between_ideals_are_loads(graph: Graph) -> None:
    cluster = cluster_of(1000, 1000, 1000)
    atoms = stage_atoms(graph, cluster)
    ideals = all_ideals(atoms, 200)
    if ideals is None:
        return
    table, every = family(atoms, ideals), np.arange(len(ideals))
    seconds, _ = table.between(every, every)
    for row, small in enumerate(ideals):
        for column, large in enumerate(ideals):
            if small & ~large:
                assert seconds[row, column] == math.inf
                continue
            split = atoms.spread([0 if small >> a & 1 else 1 if large >> a & 1 else 2 for a in range(len(atoms.members))])
            work = table.seconds[column] - table.seconds[row]
            assert work + seconds[row, column] == pytest.approx(plain_load(graph, cluster, split)[1])
            assert table.held_bytes[column] - table.held_bytes[row] <= held_bytes(graph, cluster, split)[1]


@settings(deadline=None, max_examples=40)
@given(graphs(most=6, outputs=False), st.integers(2, 3))
def test_folding_keeps_the_best(graph: Graph, devices: int) -> None:
    """Brute force over the splits of fewer atoms finds the same as over all. Most operators take no time, and sending is dear."""
    graph = replace(graph, operators=tuple(replace(one, seconds=5.0 * (one.seconds > 2)) for one in graph.operators))
    cluster = cluster_of(*[10**6] * devices)
    folded = fold(stage_atoms(graph, cluster), ample=True)
    splits = (folded.spread(chosen) for chosen in product(range(devices), repeat=len(folded.members)))
    best = min(max(plain_load(graph, cluster, split)) for split in splits if flows_one_way(graph, split))
    assert best == pytest.approx(least(graph, cluster, one_way=True))


def test_folding_joins_what_takes_no_time() -> None:
    operators = (
        Operator("a", 1.0, transfer_seconds=1.0),
        Operator("view", 0.0, transfer_seconds=2.0),
        Operator("b", 1.0),
        Operator("end", 0.0, 5),
    )
    graph = Graph("views", operators, ((0, 1), (1, 2), (0, 3)))
    atoms = stage_atoms(graph, cluster_of(9, 9))
    assert sorted(map(sorted, fold(atoms, ample=True).members)) == [[0, 3], [1, 2]]
    assert sorted(map(sorted, fold(atoms, ample=False).members)) == [[0], [1, 2], [3]], "what holds bytes stays where memory is short"
    both = (Operator("a", 1.0, transfer_seconds=1.0), Operator("b", 1.0, transfer_seconds=1.0), Operator("sum", 0.0, transfer_seconds=1.9))
    sums = Graph("sums", (*both, Operator("c", 1.0)), ((0, 2), (1, 2), (2, 3)))
    assert len(fold(stage_atoms(sums, cluster_of(9, 9)), ample=True).members) == 4, "two inputs take longer to send than their sum"


@quick
@given(st.data(), graphs(most=8))
def test_coarse_atoms_cost_what_their_pieces_cost(data: st.DataObject, graph: Graph) -> None:
    cluster = cluster_of(100, 100)
    atoms = stage_atoms(graph, cluster)
    order = data.draw(st.sampled_from(linear_orders(atoms)))
    small = coarse(atoms, order, 3)
    assert sorted(at for members in small.members for at in members) == list(range(len(graph.operators)))
    assert len(small.members) <= min(len(atoms.members), 3 + 1)
    assert all(source < target for target, sources in enumerate(small.follows) for source in sources)
    device_of = [data.draw(st.integers(0, 1)) for _ in small.members]
    assert Loads(small, cluster, device_of).seconds == pytest.approx(plain_load(graph, cluster, small.spread(device_of)))
    assert join(atoms, [0] * len(atoms.members)).outputs == ()


@quick
@given(st.data(), graphs(most=8))
def test_the_narrowest_ideal_of_a_window(data: st.DataObject, graph: Graph) -> None:
    """No ideal that holds the order's start and nothing of its end sends less across."""
    atoms = stage_atoms(graph, cluster_of(1))
    count = len(atoms.members)
    order = data.draw(st.sampled_from(linear_orders(atoms)))
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    head, tail = prefixes(order)[start], prefixes(order)[-1] & ~prefixes(order)[stop]
    ideals = [ideal for ideal in range(1 << count) if closed(atoms, ideal) and ideal & head == head and not ideal & tail]
    crossing = family(atoms, ideals).crossing
    found = narrowest(atoms, order, start, stop)
    assert found in ideals and crossing[ideals.index(found)] == pytest.approx(min(crossing), abs=1e-6)
    assert all(closed(atoms, ideal) for ideal in narrowest_ideals(atoms, order, 4))


@quick
@given(st.data(), graphs())
def test_ideals_along_an_order(data: st.DataObject, graph: Graph) -> None:
    atoms = stage_atoms(graph, cluster_of(1))
    behind, ahead = closures(atoms)
    ideal = data.draw(st.sampled_from(prefixes(data.draw(st.sampled_from(linear_orders(atoms))))))
    found = along(ideal, behind, ahead, data.draw(st.sampled_from(linear_orders(atoms))))
    assert all(closed(atoms, other) for other in found)
    assert all(other & ideal == ideal for other in found[::2]) and all(other | ideal == ideal for other in found[1::2])
