"""m-TOPO: the cap by hand, and on random graphs."""

from hypothesis import given, settings
from placing import draw_cluster, draw_graph, is_sound, seeds

from tightfit.planner.placement.m_topo import caps, fill, m_topo
from tightfit.planner.placement.simulate import fits, simulate
from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.graph import Graph, Operator


def chain(*sizes: int, groups: str = "") -> Graph:
    """A chain of operators of these weights; `groups` names each one's group by a letter, or `-`."""
    names = [name.replace("-", "") for name in groups] or [""] * len(sizes)
    operators = tuple(Operator(f"o{at}", 1.0, size, group=name) for at, (size, name) in enumerate(zip(sizes, names, strict=True)))
    return Graph("chain", operators, tuple((at, at + 1) for at in range(len(sizes) - 1)))


def devices(*rooms: int) -> Cluster:
    return Cluster(tuple(Device(f"d{at}", room) for at, room in enumerate(rooms)), Link(1.0))


def test_the_cap_is_the_share_and_the_largest():
    """24 bytes over two equal devices: 12 + 5."""
    graph = chain(5, 4, 3, 5, 4, 3)
    assert caps(graph, devices(100, 100)) == [17, 17]
    found = m_topo(graph, devices(100, 100))
    assert found is not None
    assert found.device_of == (0, 0, 0, 0, 1, 1)  # 17 reach the cap; 4 more would exceed it


def test_shares_go_by_memory():
    assert caps(chain(4, 4, 4), devices(30, 10)) == [13, 7]


def test_it_never_goes_back():
    """After the 9 opened the second device, the 1 would still fit on the first."""
    found = fill(chain(5, 9, 1), devices(10, 10), (0, 1, 2), [10, 10])
    assert found is not None
    assert found.device_of == (0, 1, 1)


def test_where_the_cap_fails_the_real_limit_counts():
    """The cap of 9 + 6 on the first device fails at 12 bytes of memory anyway; the second takes the rest."""
    found = m_topo(chain(6, 6, 6), devices(12, 6))
    assert found is not None
    assert found.device_of == (0, 0, 1)


def test_a_group_goes_where_its_first_operator_is():
    found = m_topo(chain(4, 4, 4, 4, groups="a--a"), devices(8, 8))
    assert found is not None
    assert found.device_of == (0, 1, 1, 0)


def test_none_where_operators_remain():
    assert fill(chain(6, 6, 6), devices(10, 10), (0, 1, 2), [10, 10]) is None
    assert m_topo(chain(6, 6, 6), devices(10, 10)) is None


@given(seeds())
@settings(deadline=None, max_examples=150)
def test_what_is_found_fits(random):
    graph = draw_graph(random, 12)
    cluster = draw_cluster(random, graph)
    found = m_topo(graph, cluster)
    if found is not None:
        assert is_sound(graph, cluster, found)
        assert fits(cluster, simulate(graph, cluster, found))


@given(seeds())
@settings(deadline=None, max_examples=100)
def test_devices_only_rise_along_the_order_but_for_groups(random):
    graph = draw_graph(random, 12, groups=False)
    cluster = draw_cluster(random, graph, serial=False)
    found = fill(graph, cluster, graph.order, caps(graph, cluster))
    if found is not None:
        along = [found.device_of[at] for at in graph.order]
        assert along == sorted(along)
        held = [
            sum(graph.operators[at].weight_bytes for at in graph.order if found.device_of[at] == d) for d in range(len(cluster.devices))
        ]
        assert all(size <= cap for size, cap in zip(held, caps(graph, cluster), strict=True))
        assert fits(cluster, simulate(graph, cluster, found))
