"""Clusters as people write them."""

import math
from collections.abc import Callable

import pytest

from tightfit.terms.cluster import Cluster, Device, Link, lacks_memory, parse_devices, parse_links
from tightfit.terms.errors import TightfitError
from tightfit.terms.graph import Operator
from tightfit.terms.units import GIB


@pytest.mark.parametrize(
    ("text", "memory", "sizes", "speeds"),
    [
        ("4x8GiB", None, [8 * GIB] * 4, [1.0] * 4),
        ("2 x 8GiB, 24GiB@1.5", None, [8 * GIB, 8 * GIB, 24 * GIB], [1.0, 1.0, 1.5]),
        ("3", 5 * GIB, [5 * GIB] * 3, [1.0] * 3),
        ("2x1GB@0.5", 5 * GIB, [10**9] * 2, [0.5] * 2),
        ("2x1073741824,1073741824B", None, [GIB] * 3, [1.0] * 3),
        ("2@2", GIB, [GIB] * 2, [2.0] * 2),
    ],
)
def test_devices(text: str, memory: int | None, sizes: list[int], speeds: list[float]) -> None:
    devices = parse_devices(text, memory)
    assert [device.memory_bytes for device in devices] == sizes
    assert [device.speed for device in devices] == speeds
    assert len({device.name for device in devices}) == len(devices)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "a device is missing"),
        ("4x8GiB,,2", "a device is missing"),
        ("4x8GiB, ", "a device is missing"),
        ("x", "`x` is not a device"),
        ("4x", "`4x` is not a device"),
        ("4x8parsecs", "`4x8parsecs` is not a device"),
        ("8GiB@fast", "`8GiB@fast` is not a device"),
        ("-2", "`-2` is not a device"),
        ("2x-1GiB", "`2x-1GiB` is not a device"),
        ("2x0GiB", "`2x0GiB` is not a device"),
        ("²", "`²` is not a device"),
        ("9" * 5000, "is not a device"),
        ("0", "`0` is no device"),
        ("8GiB@0", "`8GiB@0` is no device"),
        ("5000", "`5000` is no device"),
        ("1073741824", "`1073741824` is no device"),
        ("99999999x8GiB", "`99999999x8GiB` is no device"),
    ],
)
def test_what_is_no_device_is_refused(text: str, line: str) -> None:
    with pytest.raises(TightfitError, match=line) as caught:
        parse_devices(text, GIB)
    assert "\n" not in str(caught.value)
    assert "device" in caught.value.hint or "4x8GiB" in caught.value.hint


@pytest.mark.parametrize(("text", "lacks"), [("4", True), ("4x8GiB", False), ("8GiB@2", False), ("4x8GiB,2@0.5", True)])
def test_a_bare_count_lacks_its_memory(text: str, lacks: bool) -> None:
    assert lacks_memory(text) is lacks


def test_a_count_needs_a_memory() -> None:
    with pytest.raises(TightfitError, match="of what memory"):
        parse_devices("4")


def test_links() -> None:
    link, links = parse_links(["10GB/s", "0-1 = 50 GB/s"], 3, 1e-5)
    assert link == Link(10e9, 1e-5)
    assert links == {(0, 1): Link(50e9, 1e-5), (1, 0): Link(50e9, 1e-5)}
    cluster = Cluster(parse_devices("3x1GiB"), link, links)
    assert cluster.link_between(1, 0).bytes_per_second == 50e9
    assert cluster.link_between(1, 2).bytes_per_second == 10e9


def test_a_link_takes_latency_and_bytes_or_what_a_file_says() -> None:
    link = Link(1e9, 0.5)
    assert link.seconds(Operator("a", 1.0, output_bytes=2 * 10**9)) == 2.5
    assert link.seconds(Operator("a", 1.0, output_bytes=2 * 10**9, transfer_seconds=0.25)) == 0.25


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("0-7=1GB/s", "names device 7, and there are devices 0 to 2"),
        ("0-0=1GB/s", "not a link"),
        ("fast", "not a rate"),
        ("a-b=1GB", "not a link"),
        ("0-1=", "the link `0-1=` has no rate"),
        ("", "the link `` has no rate"),
    ],
)
def test_what_is_no_link_is_refused(text: str, line: str) -> None:
    with pytest.raises(TightfitError, match=line):
        parse_links([text], 3)


UNSOUND = [
    ("no bytes", lambda: Device("d", 0), "`d` has 0 bytes"),
    ("bytes below zero", lambda: parse_devices("2", -1), "`device 0` has -1 bytes"),
    ("no speed", lambda: Device("d", 1, 0.0), "`d` has a speed of 0"),
    ("backwards", lambda: Device("d", 1, -1.0), "`d` has a speed of -1"),
    ("speed is no number", lambda: Device("d", 1, math.nan), "`d` has a speed of nan"),
    ("no rate", lambda: Link(0.0), "a link carries 0"),
    ("rate without end", lambda: Link(math.inf), "a link carries inf"),
    ("latency below zero", lambda: Link(1.0, -5.0), "a latency of -5"),
    ("latency without end", lambda: parse_links([], 2, math.inf), "a latency of inf"),
    ("latency of ages", lambda: Link(1.0, 1e300), r"a latency of 1e\+300"),
    ("latency is no number", lambda: Link(1.0, math.nan), "a latency of nan"),
    ("no devices", lambda: Cluster((), Link(1.0)), "a cluster has no devices"),
    ("a link to nowhere", lambda: Cluster((Device("d", 1),), Link(1.0), {(0, 9): Link(1.0)}), "from device 0 to 9"),
    ("a link from nowhere", lambda: Cluster((Device("d", 1),), Link(1.0), {(-1, 0): Link(1.0)}), "from device -1 to 0"),
]


@pytest.mark.parametrize(("make", "line"), [fault[1:] for fault in UNSOUND], ids=[fault[0] for fault in UNSOUND])
def test_what_cannot_be_is_refused_where_it_is_made(make: Callable[[], object], line: str) -> None:
    with pytest.raises(TightfitError, match=line):
        make()


def test_a_device_has_a_name_and_runs_at_speed_one() -> None:
    assert Device("device 0", 5).speed == 1.0
