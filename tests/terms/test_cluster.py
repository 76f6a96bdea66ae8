"""Clusters as people write them."""

import pytest

from tightfit.terms.cluster import Cluster, Device, Link, parse_devices, parse_links
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
        ("1073741824", None, [GIB], [1.0]),
    ],
)
def test_devices(text: str, memory: int | None, sizes: list[int], speeds: list[float]) -> None:
    devices = parse_devices(text, memory)
    assert [device.memory_bytes for device in devices] == sizes
    assert [device.speed for device in devices] == speeds
    assert len({device.name for device in devices}) == len(devices)


@pytest.mark.parametrize("text", ["", "x", "0", "4x", "4x8parsecs", "8GiB@0", "8GiB@fast", "-2", "4x8GiB,,2"])
def test_what_is_no_device_is_refused(text: str) -> None:
    with pytest.raises(TightfitError) as caught:
        parse_devices(text, GIB)
    assert "\n" not in str(caught.value)


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
    ],
)
def test_what_is_no_link_is_refused(text: str, line: str) -> None:
    with pytest.raises(TightfitError, match=line):
        parse_links([text], 3)


def test_a_device_has_a_name_and_runs_at_speed_one() -> None:
    assert Device("device 0", 5).speed == 1.0
