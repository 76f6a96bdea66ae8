"""Graph: smaller graphs, their costs by hand, and what their placements mean for the whole graph."""

import pytest
from hypothesis import given, settings
from placing import draw_cluster, draw_graph, is_sound, seeds

from tightfit.planner.placement.graph import chains, co_placed, forward_only, fused
from tightfit.planner.placement.m_etf import m_etf
from tightfit.planner.placement.simulate import fits, simulate
from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.errors import TightfitError
from tightfit.terms.graph import Graph, Operator
from tightfit.terms.placement import Placement


def plain(count: int, edges: tuple[tuple[int, int], ...], group: str = "") -> Graph:
    return Graph("plain", tuple(Operator(f"o{at}", 1.0, 1, output_bytes=1, group=group) for at in range(count)), edges)


def drawn(random, graph: Graph, cluster: Cluster) -> Placement:
    """Any placement, groups together."""
    homes = [random.randrange(len(cluster.devices)) for _ in graph.groups]
    device_of = {at: home for home, members in zip(homes, graph.groups, strict=True) for at in members}
    return Placement(tuple(device_of[at] for at in range(len(device_of))), graph.order, "random")


def test_an_operator_with_one_reader_joins_it():
    """0 and 1 have one reader each; 2 has two."""
    groups = co_placed(plain(5, ((0, 2), (1, 2), (2, 3), (2, 4)))).groups
    assert groups == ((0, 1, 2), (3,), (4,))


def test_co_placement_stops_at_its_limits():
    chain = plain(6, tuple((at, at + 1) for at in range(5)))
    assert co_placed(chain).groups == (tuple(range(6)),)
    assert [len(members) for members in co_placed(chain, most_bytes=2).groups] == [2, 2, 2]
    assert [len(members) for members in co_placed(chain, most_seconds=3.5).groups] == [3, 3]


@given(seeds())
@settings(deadline=None, max_examples=100)
def test_co_placement_only_joins_groups_and_joins_all_that_it_should(random):
    graph = draw_graph(random, 14)
    joined = co_placed(graph)
    together = {at: number for number, members in enumerate(joined.groups) for at in members}
    assert all(len({together[at] for at in members}) == 1 for members in graph.groups)
    assert all(len(children) != 1 or together[at] == together[children[0]] for at, children in enumerate(graph.children))
    links = [edge for at, children in enumerate(graph.children) if len(children) == 1 for edge in ((at, children[0]),)]
    links += [(members[0], at) for members in graph.groups for at in members]
    reached = {at: {at} for at in range(len(graph.operators))}
    for one, other in links:  # the closure of these links and no more
        both = reached[one] | reached[other]
        for at in both:
            reached[at] = both
    assert len({frozenset(part) for part in reached.values()}) == len(joined.groups)


def test_an_edge_that_could_close_a_circle_stays():
    """0 → 1 → 2 and 0 → 2: contracting 0 → 2 first would close one; contracting 0 → 1 and then 1 → 2 does not."""
    assert len(fused(plain(3, ((0, 2), (0, 1), (1, 2)), "g")).graph.operators) == 1
    # with 1 outside of the group, 0 → 2 must stay: 0 has another child, and 2 another parent
    operators = tuple(Operator(f"o{at}", 1.0, group="" if at == 1 else "g") for at in range(3))
    assert len(fused(Graph("stay", operators, ((0, 1), (1, 2), (0, 2)))).graph.operators) == 3


def test_costs_of_what_is_fused():
    """The first output is read inside alone: it counts while both run. What only the second holds is there from the first's start on."""
    operators = (
        Operator("a", 1.0, weight_bytes=10, kept_bytes=1, temporary_bytes=50, output_bytes=7, group="g"),
        Operator("b", 2.0, weight_bytes=20, kept_bytes=2, temporary_bytes=30, output_bytes=5, group="g"),
        Operator("c", 1.0),
    )
    small = fused(Graph("costs", operators, ((0, 1), (1, 2))))
    one = next(operator for operator in small.graph.operators if operator.group)
    assert (one.seconds, one.weight_bytes, one.kept_bytes, one.output_bytes) == (3.0, 30, 3, 5)
    # a: 50 + 7 beside its 1 kept, while 2 + 5 are counted too early; b: 30 + 7
    assert one.temporary_bytes == max(50 + 7 - 2 - 5, 30 + 7)


@given(seeds())
@settings(deadline=None, max_examples=150)
def test_fused_graphs_have_no_circle_and_end_no_earlier(random):
    """Without a circle: `Graph` raises for one. Members are run whole, groups stay, and the whole graph ends no later."""
    graph = draw_graph(random, 14)
    small = fused(co_placed(graph))
    assert sorted(at for members in small.members for at in members) == list(range(len(graph.operators)))
    assert sum(one.weight_bytes for one in small.graph.operators) == graph.weight_bytes
    cluster = draw_cluster(random, graph, serial=False)
    placement = drawn(random, small.graph, cluster)
    whole = small.expand(placement)
    assert is_sound(graph, cluster, whole)
    assert simulate(graph, cluster, whole).makespan <= simulate(small.graph, cluster, placement).makespan


@given(seeds())
@settings(deadline=None, max_examples=200)
def test_what_fits_in_chains_fits_in_the_whole(random):
    """At every moment and on every device, the whole graph holds at most what the graph of chains does; and it runs at the same times."""
    graph = draw_graph(random, 14)
    small = chains(graph)
    cluster = draw_cluster(random, graph)
    placement = drawn(random, small.graph, cluster)
    whole = small.expand(placement)
    assert is_sound(graph, cluster, whole)
    step, less = simulate(graph, cluster, whole), simulate(small.graph, cluster, placement)
    assert [step.start[members[0]] for members in small.members] == list(less.start)
    assert [step.end[members[-1]] for members in small.members] == list(less.end)
    for fine, coarse in zip(step.memory, less.memory, strict=True):
        for when in sorted({when for when, _ in (*fine, *coarse)}):
            assert [size for since, size in fine if since <= when][-1] <= [size for since, size in coarse if since <= when][-1]
    found = m_etf(small.graph, cluster)
    if found is not None:
        assert fits(cluster, simulate(graph, cluster, small.expand(found)))


@given(seeds())
@settings(deadline=None, max_examples=60)
def test_a_chains_placement_goes_to_the_smaller_graph_and_back(random):
    graph = draw_graph(random, 12)
    small, cluster = chains(graph), draw_cluster(random, graph)
    placement = drawn(random, small.graph, cluster)
    assert small.shrink(small.expand(placement)) == placement
    any_order = small.shrink(drawn(random, graph, cluster))
    assert is_sound(small.graph, cluster, any_order)


@given(seeds())
@settings(deadline=None, max_examples=60)
def test_a_placement_goes_to_the_fused_graph_each_operator_after_what_it_reads(random):
    """Though members of what is fused stand far apart in the whole graph's order."""
    graph = draw_graph(random, 12)
    small, cluster = fused(co_placed(graph)), draw_cluster(random, graph)
    placement = drawn(random, small.graph, cluster)
    assert small.shrink(small.expand(placement)).device_of == placement.device_of
    assert is_sound(small.graph, cluster, small.shrink(drawn(random, graph, cluster)))


def test_a_group_stays_together_though_a_chain_starts_elsewhere():
    """`lead` and `one` become one operator of the group that `other` is in, too: it goes where most of the group's work is."""
    operators = (Operator("lead", 1.0), Operator("one", 2.0, group="g"), Operator("other", 4.0, group="g"))
    graph = Graph("led", operators, ((0, 1),))
    small = chains(graph)
    assert small.members == ((0, 1), (2,))
    assert small.shrink(Placement((1, 0, 0), (0, 1, 2), "drawn")).device_of == (0, 0)


def test_chains_stop_at_their_limits_and_between_groups():
    chain = plain(6, tuple((at, at + 1) for at in range(5)))
    assert chains(chain).members == (tuple(range(6)),)
    assert [len(members) for members in chains(chain, most_bytes=4).members] == [4, 2]
    operators = tuple(Operator(str(at), 1.0, group=name) for at, name in enumerate(("", "a", "a", "b", "b", "alone")))
    small = chains(Graph("groups", operators, chain.edges))
    assert small.members == ((0, 1, 2), (3, 4, 5))
    assert [one.group for one in small.graph.operators] == ["a", "b"]


def test_outputs_in_seconds_and_in_bytes_are_not_one():
    operators = (Operator("a", 1.0, output_bytes=4), Operator("b", 1.0, transfer_seconds=2.0))
    assert len(chains(Graph("mixed", operators, ((0, 1),))).members) == 2


def test_forward_alone_and_back():
    """A layer's backward goes where its forward is; one without a group where what it reads is."""
    operators = (
        Operator("a", 1.0, 3, group="l0"),
        Operator("b", 1.0, 4, group="l1"),
        Operator("b'", 2.0, 1, 2, group="l1", backward=True),
        Operator("a'", 2.0, group="l0", backward=True),
        Operator("loose", 1.0, 5, backward=True),
    )
    graph = Graph("training", operators, ((0, 1), (1, 2), (2, 3), (0, 3), (3, 4)))
    small = forward_only(graph)
    assert [(one.name, one.weight_bytes) for one in small.graph.operators] == [("a", 8), ("b", 7)]
    whole = small.expand(Placement((0, 1), (0, 1), "hand"))
    assert whole.device_of == (0, 1, 1, 0, 0)
    assert is_sound(graph, Cluster((Device("x", 9), Device("y", 9)), Link(1.0)), whole)


def test_forward_that_reads_backward_has_no_part_of_its_own():
    with pytest.raises(TightfitError, match="no forward part"):
        forward_only(Graph("odd", (Operator("a", 1.0, backward=True), Operator("b", 1.0)), ((0, 1),)))
