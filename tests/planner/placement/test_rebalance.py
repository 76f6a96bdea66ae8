"""Rebalance: any split, by local search and by the integer program, against all splits of tiny graphs; bounds below them."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import all_splits, cluster_of, clusters, fits, flows_one_way, graphs, least, plain_load, quick

from tightfit.planner.placement.atoms import group_atoms, stage_atoms
from tightfit.planner.placement.load import held_bytes, load
from tightfit.planner.placement.load_bounds import load_bound, refuse_too_small
from tightfit.planner.placement.load_program import load_program
from tightfit.planner.placement.rebalance import Loads, pack, rebalance, repair
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph, Operator


@quick
@given(graphs(), clusters())
def test_bounds_are_below_every_split(graph: Graph, cluster: Cluster) -> None:
    for atoms, one_way in ((group_atoms(graph, cluster), False), (stage_atoms(graph, cluster), True)):
        best = least(graph, cluster, one_way)
        assert load_bound(atoms, cluster)[0] <= best + 1e-9
        if best < math.inf:
            refuse_too_small(atoms, cluster)


def test_what_a_bound_rests_on() -> None:
    one = Graph("one", (Operator("a", 9.0), Operator("b", 1.0)), ())
    assert load_bound(group_atoms(one, cluster_of(1, 1)), cluster_of(1, 1)) == (9.0, "largest operator")
    even = Graph("even", tuple(Operator(str(at), 1.0) for at in range(8)), ())
    assert load_bound(group_atoms(even, cluster_of(1, 1)), cluster_of(1, 1)) == (4.0, "work")
    odd = Graph("odd", tuple(Operator(str(at), 2.0) for at in range(5)), ())
    assert load_bound(group_atoms(odd, cluster_of(1, 1)), cluster_of(1, 1)) == (6.0, "largest operator")
    heavy = Graph("heavy", tuple(Operator(str(at), 1.0, 1) for at in range(8)), ())
    fast = cluster_of(2, 100, speeds=(7.0, 1.0))
    assert load_bound(group_atoms(heavy, fast), fast) == (6.0, "memory")


@settings(deadline=None, max_examples=15)
@given(graphs(most=5, outputs=False), clusters(most=2))
def test_the_integer_program_finds_the_best(graph: Graph, cluster: Cluster) -> None:
    atoms = group_atoms(graph, cluster)
    solved, best = load_program(atoms, cluster, 10.0), least(graph, cluster, one_way=False)
    if best == math.inf:
        assert solved.device_of is None and solved.bound_seconds == math.inf
        return
    assert solved.device_of is not None and solved.bound_seconds == pytest.approx(best, abs=1e-5)
    assert max(plain_load(graph, cluster, atoms.spread(solved.device_of))) == pytest.approx(best, abs=1e-5)


@settings(deadline=None, max_examples=15)
@given(graphs(most=5, outputs=False))
def test_the_integer_program_in_order_is_contiguous(graph: Graph) -> None:
    cluster = cluster_of(12, 12)
    atoms = stage_atoms(graph, cluster)
    solved, best = load_program(atoms, cluster, 10.0, order=range(2)), least(graph, cluster, one_way=True)
    assert solved.bound_seconds == pytest.approx(best, abs=1e-5)
    if solved.device_of is not None:
        split = atoms.spread(solved.device_of)
        assert flows_one_way(graph, split) and max(plain_load(graph, cluster, split)) == pytest.approx(best, abs=1e-5)


@quick
@given(st.data(), graphs(), clusters())
def test_loads_are_kept_up_as_atoms_move(data: st.DataObject, graph: Graph, cluster: Cluster) -> None:
    atoms, devices = group_atoms(graph, cluster), st.integers(0, len(cluster.devices) - 1)
    split = Loads(atoms, cluster, [0] * len(atoms.members))
    for _ in range(6):
        split.move(data.draw(st.integers(0, len(atoms.members) - 1)), data.draw(devices))
        assert split.seconds == pytest.approx(plain_load(graph, cluster, atoms.spread(split.device_of)))


@settings(deadline=None, max_examples=25)
@given(graphs(), clusters())
def test_rebalance_gets_better_and_fits(graph: Graph, cluster: Cluster) -> None:
    start = pack(graph, cluster)
    if start is None:
        return
    assert fits(graph, cluster, start)
    split = rebalance(graph, cluster, start, 1.0)
    assert fits(graph, cluster, split)
    assert (
        least(graph, cluster, one_way=False) - 1e-9
        <= max(plain_load(graph, cluster, split))
        <= max(plain_load(graph, cluster, start)) + 1e-9
    )
    assert split == rebalance(graph, cluster, start, 1.0)


def test_rebalance_finds_an_even_split() -> None:
    graph = Graph("free", tuple(Operator(str(at), float(at + 1)) for at in range(12)), ())
    split = rebalance(graph, cluster_of(1, 1, 1), (0,) * 12)
    assert max(load(graph, cluster_of(1, 1, 1), split)) == 26.0


@quick
@given(st.data(), graphs(), clusters())
def test_repair_makes_a_split_fit(data: st.DataObject, graph: Graph, cluster: Cluster) -> None:
    split = data.draw(st.sampled_from(all_splits(graph, cluster)))
    found = repair(graph, cluster, split)
    assert found is None or (fits(graph, cluster, found) and found in all_splits(graph, cluster))
    if fits(graph, cluster, split):
        assert found == split


def test_repair_moves_what_costs_least() -> None:
    """Of two operators that must leave, the one goes that sends little; where nothing has room, a larger and a smaller change places."""
    operators = (Operator("a", 4.0, 2, transfer_seconds=3.0), Operator("b", 1.0, 2, transfer_seconds=9.0), Operator("c", 1.0, 2))
    graph = Graph("chain", operators, ((0, 1), (1, 2)))
    assert repair(graph, cluster_of(4, 4), (0, 0, 0)) == (1, 0, 0)
    sizes = Graph("sizes", tuple(Operator(str(at), 1.0, size) for at, size in enumerate((3, 3, 2, 2))), ())
    found = repair(sizes, cluster_of(5, 5), (0, 0, 1, 1))
    assert found is not None and sorted(held_bytes(sizes, cluster_of(5, 5), found)) == [5, 5]
    assert repair(sizes, cluster_of(4, 6), (0, 0, 1, 1)) == (1, 1, 0, 0)
