"""Improve: never worse, never past memory, the same every time; and near the best of all placements of tiny graphs."""

import random as rolls
from pathlib import Path

import pytest
from hypothesis import given, settings
from placing import all_placements, draw_cluster, draw_graph, is_sound, real_graphs, seeds

from tightfit.data.graphs import read_graph
from tightfit.planner.placement.bounds import bound, least_memory
from tightfit.planner.placement.cuts import cheapest_cuts
from tightfit.planner.placement.heft import heft
from tightfit.planner.placement.improve import Effort, improve
from tightfit.planner.placement.moves import Moves
from tightfit.planner.placement.pack import line_of, packings
from tightfit.planner.placement.simulate import fits, simulate
from tightfit.planner.placement.squeeze import squeeze
from tightfit.planner.placement.starts import BAECHI
from tightfit.planner.placement.starts import starts as all_starts
from tightfit.planner.placement.times import times
from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.graph import Graph, Operator
from tightfit.terms.placement import Placement

SHORT = Effort(evaluations=150, seconds=60)


def starts(graph: Graph, cluster: Cluster) -> dict[str, Placement]:
    """Those that were found."""
    return {name: placement for name, placement in all_starts(graph, cluster).items() if placement is not None}


@given(seeds())
@settings(deadline=None, max_examples=25)
def test_it_is_no_worse_and_stays_inside_memory(random):
    graph = draw_graph(random, 14)
    cluster = draw_cluster(random, graph)
    for start in starts(graph, cluster).values():
        found = improve(graph, cluster, start, SHORT, seed=random.randint(0, 9))
        assert is_sound(graph, cluster, found)
        step = simulate(graph, cluster, found)
        assert fits(cluster, step)
        assert step.makespan <= simulate(graph, cluster, start).makespan


def test_the_same_seed_finds_the_same():
    graph = draw_graph(rolls.Random(3), 14)
    cluster = Cluster(tuple(Device(str(at), 1000) for at in range(3)), Link(4.0))
    start = starts(graph, cluster)["m-TOPO"]
    assert len({improve(graph, cluster, start, SHORT, seed=5) for _ in range(3)}) == 1


def test_it_mostly_reaches_the_best_of_all():
    """From the worst of the starts, on tiny graphs: nine of ten, and more than the starts themselves."""
    reached, began, all_of = 0, 0, 0
    for seed in range(60):
        random = rolls.Random(seed)
        graph = draw_graph(random, 5)
        cluster = draw_cluster(random, graph)
        steps = [simulate(graph, cluster, placement) for placement in all_placements(graph, cluster)]
        best = min((step.makespan for step in steps if fits(cluster, step)), default=None)
        found = starts(graph, cluster).values()
        if best is None or not found:
            continue
        start = max(found, key=lambda placement: simulate(graph, cluster, placement).makespan)
        all_of += 1
        began += simulate(graph, cluster, start).makespan == best
        reached += simulate(graph, cluster, improve(graph, cluster, start, Effort(400, 60))).makespan == best
    assert all_of >= 35
    assert reached >= 0.9 * all_of
    assert reached >= began + 0.2 * all_of


def test_it_stops_at_what_is_good_enough():
    graph = Graph("two", (Operator("a", 1.0), Operator("b", 1.0)), ())
    cluster = Cluster((Device("x", 9), Device("y", 9)), Link(1.0))
    start = starts(graph, cluster)["one device"]
    assert improve(graph, cluster, start, SHORT, good_enough=2.0) == start
    assert simulate(graph, cluster, improve(graph, cluster, start, SHORT, good_enough=1.0)).makespan == 1.0


@given(seeds())
@settings(deadline=None, max_examples=40)
def test_moves_keep_what_lasts_inside(random):
    graph = draw_graph(random, 14)
    cluster = draw_cluster(random, graph)
    moves = Moves(graph, times(graph, cluster), random)
    for device_of in packings(graph, cluster):
        home = [device_of[members[0]] for members in graph.groups]
        left = [device.memory_bytes for device in cluster.devices]
        for group, device in enumerate(home):
            left[device] -= moves.sizes[group]
        assert min(left) >= 0
        for number in range(20):
            way = moves.parted if number % 2 else moves.patch
            for group, device in (way(home, left, range(len(home))) or {}).items():
                left[home[group]] += moves.sizes[group]
                left[device] -= moves.sizes[group]
                home[group] = device
            assert min(left) >= 0


def test_a_cut_moves_to_any_place_at_once():
    """Of 40 in a line, 30 on the first device: all that a cut parts off, on either side, goes to the other device, and nothing else."""
    graph = Graph("line", tuple(Operator(str(at), 1.0) for at in range(40)), tuple((at, at + 1) for at in range(39)))
    cluster = Cluster((Device("x", 9), Device("y", 9)), Link(1.0))
    moves, home = Moves(graph, times(graph, cluster), rolls.Random(0)), [0] * 30 + [1] * 10
    found = {(min(moved), max(moved), len(moved)) for _ in range(2000) if (moved := moves.parted(home, [9, 9], range(40)))}
    ahead = {(0, to, to + 1) for to in range(30)} | {(30, to, to - 29) for to in range(30, 40)}
    behind = {(since, 29, 30 - since) for since in range(30)} | {(since, 39, 40 - since) for since in range(30, 40)}
    assert found == ahead | behind


@pytest.mark.realdata
def test_a_dear_cut_is_left_for_one_far_away():
    """ResNet-50's cheapest cut by seconds is inside no block; one inside, where two transfers overlap, gives a step 4 % shorter."""
    path = real_graphs() / "pipedream" / "resnet50.graph.txt"
    if not path.exists():
        pytest.skip(f"the real graphs are not in {real_graphs()}: set `TIGHTFIT_DATA`")
    graph = read_graph(str(path)).graph
    cluster = Cluster(tuple(Device(str(at), 14_262_667_729) for at in range(4)), Link(12e9))
    start = BAECHI["m-TOPO"](graph, cluster)
    assert start is not None
    assert simulate(graph, cluster, start).makespan > 0.49
    assert simulate(graph, cluster, improve(graph, cluster, start, Effort(1500, 60), seed=1)).makespan < 0.475


@given(seeds())
@settings(deadline=None, max_examples=60)
def test_every_start_fits(random):
    graph = draw_graph(random, 14)
    cluster = draw_cluster(random, graph)
    for placement in starts(graph, cluster).values():
        assert is_sound(graph, cluster, placement)
        assert fits(cluster, simulate(graph, cluster, placement))


def test_a_start_is_found_nearly_wherever_one_exists():
    """Over all placements of tiny graphs: 99 of 100 of those that can be placed; and squeezing finds some that no other way does."""
    exist, found, squeezed = 0, 0, 0
    for seed in range(400):
        random = rolls.Random(seed)
        graph = draw_graph(random, 4)
        cluster = draw_cluster(random, graph)
        if any(fits(cluster, simulate(graph, cluster, placement)) for placement in all_placements(graph, cluster)):
            ways = starts(graph, cluster)
            exist, found, squeezed = exist + 1, found + bool(ways), squeezed + ("squeeze" in ways)
        else:
            assert squeeze(graph, cluster, evaluations=50) is None
    assert exist > 250
    assert found >= 0.99 * exist
    assert squeezed


def test_heft_puts_what_is_short_into_a_gap():
    """While x waits 4 s for the output of b, it runs `short`, which is the least urgent."""
    operators = (Operator("a", 4.0, output_bytes=9), Operator("b", 4.0, output_bytes=4), Operator("join", 5.0), Operator("short", 3.0))
    graph = Graph("gap", operators, ((0, 2), (1, 2)))
    cluster = Cluster((Device("x", 99), Device("y", 99)), Link(1.0))
    found = heft(graph, cluster)
    assert found is not None
    step = simulate(graph, cluster, found)
    assert step.start[2] == 8
    assert step.start[3] == 4
    assert step.makespan == 13


@given(seeds())
@settings(deadline=None, max_examples=100)
def test_cheapest_cuts_are_the_cheapest_of_all(random):
    """Against every way to give the line to the devices in turn."""
    graph = draw_graph(random, 9)
    cluster = draw_cluster(random, graph, alike=True)
    costs, line = times(graph, cluster), line_of(graph, graph.order)
    moves = Moves(graph, costs, random)
    rooms = [device.memory_bytes for device in cluster.devices]

    def price(ends: tuple[int, ...]) -> float:
        """Seconds to send each output over all cuts that lie between its maker and its readers."""
        piece = {group: sum(place >= end for end in ends) for place, group in enumerate(line)}
        place = {group: at for at, group in enumerate(line)}
        total = 0.0
        for at, children in enumerate(graph.children):
            spots = [place[moves.group[other]] for other in (at, *children)]
            total += costs.typical_send[at] * sum(min(spots) < end <= max(spots) for end in set(ends) if 0 < end < len(line))
        held = [0] * len(rooms)
        for group, number in piece.items():
            held[number] += moves.sizes[group]
        return total if all(size <= room for size, room in zip(held, rooms, strict=True)) else float("inf")

    def all_ends(count: int, low: int = 0):
        if not count:
            yield ()
        else:
            for end in range(low, len(line) + 1):
                for rest in all_ends(count - 1, end):
                    yield (end, *rest)

    best = min(price(ends) for ends in all_ends(len(rooms) - 1))
    homes = cheapest_cuts(graph, costs, line, moves.sizes, rooms)
    assert (homes is None) == (best == float("inf"))
    if homes is not None:
        along = [homes[group] for group in line]
        assert along == sorted(along)
        ends = tuple(sum(device <= number for device in along) for number in range(len(rooms) - 1))
        assert abs(price(ends) - best) < 1e-9


@pytest.mark.realdata
@pytest.mark.parametrize("file", ["bert24_inference", "gnmt_inference", "resnet50_inference", "inceptionv3_inference"])
def test_real_graphs_with_ample_memory_end_near_the_bound(file: str):
    """Within a twentieth, but for Inception-V3 with dear transfers, where the best start is 13 % above and is to get better."""
    path: Path = real_graphs() / "dnn-partitioning" / "latency-inputs" / "LayerGraphs" / f"{file}.json"
    if not path.exists():
        pytest.skip(f"the real graphs are not in {real_graphs()}: set `TIGHTFIT_DATA`")
    graph = read_graph(str(path)).graph
    cluster = Cluster(tuple(Device(str(at), 2**40) for at in range(4)), Link(12e9))
    least_memory(graph, cluster)
    below, _ = bound(graph, cluster)
    start = min(starts(graph, cluster).values(), key=lambda placement: simulate(graph, cluster, placement).makespan)
    found = simulate(graph, cluster, improve(graph, cluster, start, Effort(1500, 60), good_enough=below)).makespan
    assert below <= found <= simulate(graph, cluster, start).makespan
    assert found <= below * (1.15 if "inception" in file else 1.05)
