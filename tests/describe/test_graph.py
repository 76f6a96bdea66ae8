"""Graphs from tapes that were written by hand or drawn: exact bytes, edges and groups, and memory against a walk over what is alive."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.describe.graph import Captured, graph_of
from tightfit.describe.tape import Call, Storage, Tape, Visit, Window
from tightfit.planner.placement.simulate import simulate
from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.errors import TightfitError
from tightfit.terms.placement import Placement


def window(storage: int) -> Window:
    return Window(storage, torch.uint8, (1,), (1,), 0)


def call(
    name: str,
    reads: tuple[int, ...],
    makes: tuple[int, ...] = (),
    writes: tuple[int, ...] = (),
    visit: int | None = None,
    backward: bool = False,
    forward: int | None = None,
    workspace: int = 0,
) -> Call:
    results = tuple(map(window, makes))
    return Call(f"aten.{name}.default", (), {}, results, reads, writes, makes, visit, backward, forward, 0.0, 0, workspace)


def tape(
    calls: list[Call],
    made: dict[int, int],
    inputs: dict[int, int] | None = None,
    weights: dict[int, int] | None = None,
    results: tuple[int, ...] = (),
    visits: tuple[Visit, ...] = (),
    gradients: dict[int, int] | None = None,
) -> Tape:
    """Storages by number → bytes; `gradients`: of the weight with this number, in that storage."""
    kinds = {number: ("input", size) for number, size in (inputs or {}).items()}
    kinds |= {number: ("parameter", size) for number, size in (weights or {}).items()}
    kinds |= {number: ("made", size) for number, size in made.items()}
    storages = tuple(
        Storage(kind, size, "" if kind == "made" else f"s{number}", size, size // 4 if kind == "parameter" else 0)
        for number, (kind, size) in sorted(kinds.items())
    )
    found = {f"s{weight}": window(storage) for weight, storage in (gradients or {}).items()}
    return Tape("drawn", tuple(calls), storages, visits, tuple(map(window, results)), found)


def edges(captured: Captured) -> set[tuple[str, str]]:
    names = [operator.name for operator in captured.graph.operators]
    return {(names[source], names[target]) for source, target in captured.graph.edges}


def test_a_straight_line() -> None:
    """An input of 7, a weight of 100 that `a` reads, outputs of 10 and 20, 3 bytes of scratch, and 5 that nobody reads."""
    steps = [call("a", (0, 1), (2, 3), workspace=3), call("b", (2,), (4,))]
    captured = graph_of(tape(steps, {2: 10, 3: 5, 4: 20}, {0: 7}, {1: 100}, results=(4,)))
    given, a, b = captured.graph.operators
    assert [given.name, a.name, b.name] == ["input: s0", "loss: a", "loss: b"]
    assert (given.output_bytes, a.output_bytes, b.output_bytes) == (7, 10, 20)
    assert (given.weight_bytes, a.weight_bytes, b.weight_bytes) == (0, 100, 0)
    assert (given.temporary_bytes, a.temporary_bytes, b.temporary_bytes) == (0, 8, 0)
    assert captured.graph.edges == ((0, 1), (1, 2))
    assert captured.parts == ((), (0,), (1,))
    assert {operator.group for operator in captured.graph.operators} == {""}


def test_an_operation_in_place_stays_with_what_it_changes_and_waits_for_readers_of_the_old() -> None:
    steps = [call("made", (0,), (1,)), call("old", (1,), (2,)), call("change_", (1,), writes=(1,)), call("new", (1,), (3,))]
    captured = graph_of(tape(steps, {1: 10, 2: 20, 3: 30}, {0: 7}, results=(2, 3)))
    _, made, old, change, new = captured.graph.operators
    assert edges(captured) == {
        ("input: s0", "loss: made"),
        ("loss: made", "loss: old"),
        ("loss: made", "loss: change_"),
        ("loss: old", "loss: change_"),
        ("loss: made", "loss: new"),
        ("loss: change_", "loss: new"),
    }
    assert made.group == change.group == "loss: made"
    assert old.group == new.group == ""
    assert (made.output_bytes, old.output_bytes, change.output_bytes, new.output_bytes) == (10, 0, 0, 30)
    assert old.kept_bytes == 20  # a result: nobody reads it, though another waits for it


def test_what_only_its_own_backward_reads_is_kept_and_not_sent() -> None:
    """`f` gives 10, which `g` reads too, and a mask of 4 for its own backward; the gradient of its weight is counted with the weight."""
    steps = [
        call("f", (0, 1), (2, 3)),
        call("g", (2,), (4,)),
        call("g", (2, 4), (5,), backward=True, forward=1),
        call("f", (0, 3, 5), (6,), backward=True, forward=0),
    ]
    drawn = tape(steps, {2: 10, 3: 4, 4: 1, 5: 10, 6: 100}, {0: 7}, {1: 100}, (4,), gradients={1: 6})
    captured = graph_of(drawn, state_bytes=8)
    _, f, g, g_back, f_back = captured.graph.operators
    assert (f.output_bytes, f.kept_bytes) == (10, 4)
    assert f.weight_bytes == 100 + 100 + 8 * 25
    assert (f_back.output_bytes, f_back.temporary_bytes, f_back.weight_bytes) == (0, 0, 0)
    leaving = graph_of(drawn, state_bytes=8, gradients_stay=False).graph.operators
    assert (leaving[1].weight_bytes, leaving[4].output_bytes) == (100 + 8 * 25, 100)
    assert f.group == f_back.group != g.group == g_back.group
    assert [operator.backward for operator in captured.graph.operators] == [False, False, False, True, True]
    assert (f_back.name, g_back.name) == ("loss: f backward", "loss: g backward")


def test_users_of_one_parameter_share_a_group_and_its_bytes_count_once() -> None:
    steps = [call("embed", (0, 1), (2,)), call("middle", (2,), (3,)), call("head", (1, 3), (4,))]
    captured = graph_of(tape(steps, {2: 10, 3: 10, 4: 10}, {0: 7}, {1: 100}, results=(4,)))
    _, embed, middle, head = captured.graph.operators
    assert embed.group == head.group == "loss: embed"
    assert middle.group == ""
    assert (embed.weight_bytes, head.weight_bytes) == (100, 0)


VISITS = (
    Visit("", "Model", False, False, None),
    Visit("block.0", "Block", False, True, 0),
    Visit("block.0.first", "Linear", True, False, 1),
    Visit("block.0.pair", "Pair", False, False, 1),
    Visit("block.0.pair.one", "Linear", True, False, 3),
    Visit("block.0.pair.two", "Linear", True, False, 3),
)


@pytest.mark.parametrize(
    ("grain", "whole", "names"),
    [
        (
            "operator",
            (),
            ["block.0.first: mm", "block.0.first: add", "block.0: mul", "block.0.pair.one: mm", "block.0.pair.two: mm", "sum"],
        ),
        ("operator", ("Pair",), ["block.0.first: mm", "block.0.first: add", "block.0: mul", "block.0.pair", "sum"]),
        ("module", (), ["block.0.first", "block.0: mul", "block.0.pair.one", "block.0.pair.two", "sum"]),
        ("module", ("Pair",), ["block.0.first", "block.0: mul", "block.0.pair", "sum"]),
        ("block", (), ["block.0", "sum"]),
    ],
)
def test_grains(grain: str, whole: tuple[str, ...], names: list[str]) -> None:
    steps = [
        call("mm", (0,), (1,), visit=2),
        call("add", (1,), (2,), visit=2),
        call("mul", (2,), (3,), visit=1),
        call("mm", (3,), (4,), visit=4),
        call("mm", (4,), (5,), visit=5),
        call("sum", (5,), (6,), visit=0),
    ]
    captured = graph_of(tape(steps, dict.fromkeys(range(1, 7), 10), {0: 7}, results=(6,), visits=VISITS), grain, whole)
    assert [operator.name for operator in captured.graph.operators][1:] == names
    assert [call for calls in captured.parts for call in calls] == list(range(6))


def test_names_are_one_of_a_kind() -> None:
    steps = [call("mm", (0,), (1,), visit=2), call("mm", (1,), (2,), visit=2), call("mm", (2,), (3,), visit=2)]
    captured = graph_of(tape(steps, dict.fromkeys(range(1, 4), 10), {0: 7}, results=(3,), visits=VISITS))
    assert [operator.name for operator in captured.graph.operators][1:] == [
        "block.0.first: mm",
        "block.0.first: mm 2",
        "block.0.first: mm 3",
    ]


def test_an_unread_weight_lies_next_to_its_module() -> None:
    steps = [call("mm", (0,), (1,), visit=0), call("add", (1,), (2,), visit=4)]
    drawn = tape(steps, {1: 10, 2: 10}, {0: 7}, {3: 50}, results=(2,), visits=VISITS)
    named = replace(drawn, storages=(*drawn.storages[:3], replace(drawn.storages[3], name="block.0.pair.unused")))
    assert [operator.weight_bytes for operator in graph_of(named).graph.operators] == [0, 0, 50]


def test_a_strange_grain_is_told() -> None:
    with pytest.raises(TightfitError, match="no grain is called `modules`") as caught:
        graph_of(tape([call("a", (0,), (1,))], {1: 10}, {0: 7}), "modules")
    assert "`module`" in caught.value.hint


def test_a_result_that_is_read_too_stays_when_its_readers_are_done() -> None:
    steps = [call("a", (0,), (1,)), call("b", (1,), (2,))]
    _, a, b = graph_of(tape(steps, {1: 10, 2: 20}, {0: 7}, results=(1, 2))).graph.operators
    assert (a.output_bytes, a.kept_bytes, b.output_bytes, b.kept_bytes) == (10, 10, 20, 0)


@st.composite
def tapes(draw: st.DrawFn, plain: bool) -> Tape:
    """Up to 12 calls that read what was there and make something, in runs of modules.

    If not `plain`, some make two storages or change what was made, and results may be read.
    """
    count = draw(st.integers(1, 12))
    steps: list[Call] = []
    made: dict[int, int] = {}
    visits: list[Visit] = [Visit("", "Model", False, False, None)]
    for number in range(count):
        there = [0, 1, *made]
        reads = draw(st.lists(st.sampled_from(there), min_size=1, max_size=3, unique=True))
        new = tuple(2 + len(made) + place for place in range(1 if plain else draw(st.integers(1, 2))))
        made |= {storage: draw(st.integers(1, 50)) for storage in new}
        changed = (
            draw(st.lists(st.sampled_from([at for at in there if at > 1] or [0]), max_size=1)) if number % 3 == 2 and not plain else []
        )
        writes = tuple(storage for storage in changed if storage > 1)
        if number % 4 == 0:
            visits.append(Visit(f"part.{number}", "Linear", True, False, 0))
        visit = draw(st.sampled_from([0, len(visits) - 1]))
        steps.append(call("do", (*reads, *(at for at in writes if at not in reads)), new, writes, visit, workspace=draw(st.integers(0, 9))))
    read = {storage for step in steps for storage in step.reads} if plain else set()
    results = tuple(draw(st.lists(st.sampled_from([*(set(made) - read)]), max_size=2, unique=True)))
    return tape(steps, made, {0: 11}, {1: 100}, results, tuple(visits))


def peak(captured: Captured) -> int:
    """On one device, in the order of the tape, each operator a second long."""
    graph = replace(captured.graph, operators=tuple(replace(one, seconds=1.0) for one in captured.graph.operators))
    everything = tuple(range(len(graph.operators)))
    cluster = Cluster((Device("one", 1 << 40),), Link(1e9))
    return simulate(graph, cluster, Placement((0,) * len(everything), everything, "tape")).peak_bytes[0]


def alive(drawn: Tape) -> int:
    """The highest sum of weights, of what is read or changed later, of results, and of what a call makes and needs by itself."""
    last = {storage: at for at, step in enumerate(drawn.calls) for storage in (*step.reads, *step.writes)}
    results = {result.storage for result in drawn.results}
    held, highest = {0} if 0 in last else set(), 0
    for at, step in enumerate(drawn.calls):
        held |= set(step.makes)
        highest = max(highest, 100 + sum(drawn.storages[storage].size_bytes for storage in held) + step.workspace_bytes)
        held = {storage for storage in held if last.get(storage, -1) > at or storage in results}
    return highest


@settings(deadline=None, max_examples=100)
@given(tapes(plain=True))
def test_memory_on_one_device_is_what_is_alive(drawn: Tape) -> None:
    assert peak(graph_of(drawn)) == alive(drawn)


@settings(deadline=None, max_examples=100)
@given(tapes(plain=False), st.sampled_from(["operator", "module"]))
def test_memory_is_never_promised_too_low(drawn: Tape, grain: str) -> None:
    assert peak(graph_of(drawn, grain)) >= alive(drawn)


@settings(deadline=None, max_examples=100)
@given(tapes(plain=True))
def test_coarser_graphs_promise_no_less_memory_and_the_same_weights(drawn: Tape) -> None:
    fine, coarse = graph_of(drawn), graph_of(drawn, "module")
    assert len(coarse.graph.operators) <= len(fine.graph.operators)
    assert coarse.graph.weight_bytes == fine.graph.weight_bytes == 100
    assert peak(coarse) >= peak(fine)
    assert [number for calls in coarse.parts for number in calls] == list(range(len(drawn.calls)))
