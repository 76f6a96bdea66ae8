"""Simulate: against figures by hand, and against a second simulator that steps through time second by second."""

import pytest
from hypothesis import given, settings
from placing import draw_cluster, draw_graph, is_sound, seeds

from tightfit.planner.placement.memory import Profile
from tightfit.planner.placement.simulate import fits, simulate
from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.graph import Graph, Operator
from tightfit.terms.placement import Placement, Schedule


def two(memory: int = 100, serial: bool = False) -> Cluster:
    """Two devices, and a link of one byte per second."""
    return Cluster((Device("a", memory), Device("b", memory)), Link(1.0), serial=serial)


FORK = Graph(
    "fork",
    (
        Operator("source", 2.0, weight_bytes=10, output_bytes=3),
        Operator("near", 4.0, temporary_bytes=5, output_bytes=1),
        Operator("far", 1.0, weight_bytes=20, kept_bytes=7, output_bytes=2),
        Operator("also far", 1.0, output_bytes=2),
        Operator("sink", 1.0, output_bytes=4),
    ),
    ((0, 1), (0, 2), (0, 3), (1, 4), (2, 4), (3, 4)),
)
SPLIT = Placement((0, 0, 1, 1, 0), (0, 1, 2, 3, 4), "hand")


def test_an_output_is_sent_once_to_each_device():
    step = simulate(FORK, two(), SPLIT)
    assert step.start == (0, 2, 5, 6, 9)
    assert step.end == (2, 6, 6, 7, 10)
    assert [(t.operator, t.source, t.target, t.start, t.end) for t in step.transfers] == [(0, 0, 1, 2, 5), (2, 1, 0, 6, 8), (3, 1, 0, 7, 9)]
    assert step.makespan == 10


def test_memory_over_time_by_hand():
    near, far = simulate(FORK, two(), SPLIT).memory
    # source 10 + its output 3; near's 5 and 1 from 2 to 6; source's output goes at 6; arrivals of 2 at 6 and at 7; the sink's 4 at 9
    assert near == ((0.0, 13), (2.0, 19), (6.0, 13), (7.0, 15), (9.0, 19), (10.0, 14))
    # far's weights; the source's output on its way from 2; far's 7 and 2 at 5; also far's 2 at 6; the source's 3 goes at 7; outputs as sent
    assert far == ((0.0, 20), (2.0, 23), (5.0, 32), (6.0, 34), (7.0, 31), (8.0, 29), (9.0, 27))
    assert simulate(FORK, two(), SPLIT).peak_bytes == (19, 34)


def test_fits_is_the_peak_against_each_devices_memory():
    step = simulate(FORK, two(), SPLIT)
    assert fits(two(34), step)
    assert not fits(two(33), step)


def test_one_channel_each_sends_one_after_the_other():
    graph = Graph("pair", (Operator("p", 1.0, output_bytes=4), Operator("q", 1.0, output_bytes=2), Operator("r", 1.0)), ((0, 2), (1, 2)))
    placement = Placement((0, 0, 1), (0, 1, 2), "hand")
    assert simulate(graph, two(), placement).start[2] == 5  # p arrives at 5, q at 4
    step = simulate(graph, two(serial=True), placement)
    assert [(t.start, t.end) for t in step.transfers] == [(1, 5), (5, 7)]
    assert step.start[2] == 7


def test_a_channel_receives_or_sends():
    """b receives p until 5, and only then sends its own output."""
    operators = (Operator("p", 1.0, output_bytes=4), Operator("q", 2.0, output_bytes=1), Operator("r", 1.0), Operator("s", 1.0))
    graph = Graph("cross", operators, ((0, 2), (1, 3)))
    step = simulate(graph, two(serial=True), Placement((0, 1, 1, 0), (0, 1, 2, 3), "hand"))
    assert [(t.operator, t.start, t.end) for t in step.transfers] == [(0, 1, 5), (1, 5, 6)]
    assert step.start[3] == 6
    assert simulate(graph, two(), Placement((0, 1, 1, 0), (0, 1, 2, 3), "hand")).start[3] == 3


def test_a_channel_receives_one_after_the_other():
    """p and q end at 1 on two devices, and both are sent to a third: q's byte waits for p's four."""
    graph = Graph("two", (Operator("p", 1.0, output_bytes=4), Operator("q", 1.0, output_bytes=1), Operator("r", 1.0)), ((0, 2), (1, 2)))
    cluster = Cluster(tuple(Device(name, 99) for name in "abc"), Link(1.0), serial=True)
    step = simulate(graph, cluster, Placement((0, 1, 2), (0, 1, 2), "hand"))
    assert [(t.operator, t.start, t.end) for t in step.transfers] == [(0, 1, 5), (1, 5, 6)]


def test_speeds_and_links():
    graph = Graph("chain", (Operator("p", 4.0, output_bytes=6), Operator("q", 4.0)), ((0, 1),))
    cluster = Cluster((Device("a", 99, 2.0), Device("b", 99, 0.5)), Link(1.0), {(0, 1): Link(3.0, 1.0)})
    assert simulate(graph, cluster, Placement((0, 1), (0, 1), "hand")).end == (2, 13)  # 2 + 1 + 6 / 3 + 4 / 0.5
    assert simulate(graph, cluster, Placement((1, 0), (0, 1), "hand")).end == (8, 16)  # 8 + 6 + 2


def test_an_order_that_cannot_run_is_our_own_mistake():
    for cluster in (two(), two(serial=True)):
        with pytest.raises(AssertionError):
            simulate(FORK, cluster, Placement((0, 0, 0, 0, 0), (4, 0, 1, 2, 3), "hand"))


def stepped(graph: Graph, cluster: Cluster, placement: Placement) -> dict:
    """Every quarter second anew: end what ends, queue what became ready, start what can. Slow and plain."""
    tick, count = 0.25, len(graph.operators)
    start, end = [None] * count, [None] * count
    ready, sent, now = [], {}, 0.0
    queued, place = set(), {at: number for number, at in enumerate(placement.order)}
    while None in end or any(one > now for one in end) or ready:
        for _ in range(3 * count + 3):  # what takes no time may follow on itself
            done = [at for at in range(count) if end[at] is not None and end[at] <= now]
            for at in sorted(set(done) - queued, key=lambda at: (end[at], place[at]))[:1]:
                queued.add(at)
                home = placement.device_of[at]
                for target in sorted({placement.device_of[child] for child in graph.children[at]} - {home}):
                    ready.append((at, home, target))
            for at, home, target in list(ready):
                takes = cluster.link_between(home, target).seconds(graph.operators[at])
                earlier = ready[: ready.index((at, home, target))]
                busy = any({home, target} & {graph_home, to} for _, graph_home, to in earlier)
                busy |= any(b <= now < e and {home, target} & {placement.device_of[o], to} for (o, to), (b, e) in sent.items())
                if not cluster.serial or not busy:
                    sent[at, target] = (now, now + takes)
                    ready.remove((at, home, target))
            for device, runs in enumerate(cluster.devices):
                line = [at for at in placement.order if placement.device_of[at] == device]
                waits = [at for at in line if start[at] is None]
                if not waits or any(start[at] is not None and end[at] > now for at in line):
                    continue
                at = waits[0]
                there = all(
                    end[p] is not None
                    and end[p] <= now
                    and (placement.device_of[p] == device or ((p, device) in sent and sent[p, device][1] <= now))
                    for p in graph.parents[at]
                )
                if there:
                    start[at], end[at] = now, now + graph.operators[at].seconds / runs.speed
        now += tick
    return {"start": tuple(start), "end": tuple(end), "sent": sent}


@given(seeds())
@settings(deadline=None, max_examples=60)
def test_times_are_those_of_a_simulator_that_steps_through_time(random):
    graph = draw_graph(random, 6)
    cluster = draw_cluster(random, graph)
    placement = drawn(random, graph, cluster)
    step, plain = simulate(graph, cluster, placement), stepped(graph, cluster, placement)
    assert (step.start, step.end) == (plain["start"], plain["end"])
    assert {(t.operator, t.target): (t.start, t.end) for t in step.transfers} == plain["sent"]


def drawn(random, graph: Graph, cluster: Cluster) -> Placement:
    """A random placement, groups together."""
    homes = [random.randrange(len(cluster.devices)) for _ in graph.groups]
    device_of = {at: home for home, members in zip(homes, graph.groups, strict=True) for at in members}
    waits, order = {at: len(graph.parents[at]) for at in device_of}, []
    while waits:
        order.append(random.choice([at for at, count in waits.items() if not count]))
        del waits[order[-1]]
        for child in graph.children[order[-1]]:
            waits[child] -= 1
    return Placement(tuple(device_of[at] for at in range(len(device_of))), tuple(order), "random")


def held_at(graph: Graph, placement: Placement, step: Schedule, device: int, when: float) -> int:
    """What the definition says is there at `when`, operator by operator."""
    total = 0
    for at, one in enumerate(graph.operators):
        here = placement.device_of[at] == device
        readers = [child for child in graph.children[at] if placement.device_of[child] == device]
        arrivals = [t for t in step.transfers if t.operator == at]
        if here:
            total += one.weight_bytes
            total += one.kept_bytes if when >= step.start[at] else 0
            total += one.temporary_bytes if step.start[at] <= when < step.end[at] else 0
            until = max([step.end[child] for child in readers] + [t.end for t in arrivals], default=float("inf"))
            total += one.output_bytes if step.start[at] <= when < until else 0
        for arrival in arrivals:
            if arrival.target == device and arrival.start <= when < max(step.end[child] for child in readers):
                total += one.output_bytes
    return total


@given(seeds())
@settings(deadline=None, max_examples=150)
def test_memory_is_what_the_definition_says_at_every_moment(random):
    graph = draw_graph(random, 9)
    cluster = draw_cluster(random, graph)
    placement = drawn(random, graph, cluster)
    assert is_sound(graph, cluster, placement)
    step = simulate(graph, cluster, placement)
    moments = sorted({0.0, *step.start, *step.end, *(t.start for t in step.transfers), *(t.end for t in step.transfers)})
    for device, steps in enumerate(step.memory):
        assert [when for when, _ in steps] == sorted({when for when, _ in steps})
        for when in (*moments, *(moment + 0.0625 for moment in moments)):
            said = [held for since, held in steps if since <= when][-1]
            assert said == held_at(graph, placement, step, device, when)


@given(seeds())
@settings(deadline=None, max_examples=25)
def test_a_profile_is_the_sum_of_its_changes(random):
    profile, changes = Profile(), []
    for _ in range(random.choice((5, 50, 400))):
        when, size = float(random.randint(0, 300)), random.randint(-5, 9)
        profile.add(when, size)
        changes.append((when, size))
        if random.random() < 0.1:
            since = random.randint(-1, 301) + random.choice((0.0, 0.5))
            later = {since} | {moment for moment, _ in changes if moment >= since}
            assert profile.at(since) == sum(much for moment, much in changes if moment <= since)
            assert profile.peak == profile.highest(float("-inf"))
            assert profile.highest(since) == max(sum(much for moment, much in changes if moment <= at) for at in later)
