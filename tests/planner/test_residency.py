"""Residency: who stays and who streams, as plain numbers and by brute force."""

import random

import pytest

from tightfit.planner.residency import resident, settle

SIZES = [(blocks, room) for blocks in range(1, 41) for room in range(blocks + 2)]


def test_two_of_four_stay():
    assert resident(blocks=4, room=2) == {0, 2}


def test_all_or_none_stay():
    assert resident(blocks=3, room=3) == resident(blocks=3, room=9) == {0, 1, 2}
    assert resident(blocks=3, room=0) == set()
    assert resident(blocks=0, room=0) == set()


def test_streamed_are_bminfs():
    """BMInf 2.0: layer i is swapped iff floor((i + 1)·S / L) differs from floor(i·S / L)."""
    for blocks, room in SIZES:
        swapped = blocks - min(room, blocks)
        streamed = {i for i in range(blocks) if int((i + 1) * swapped / blocks + 1e-9) != int(i * swapped / blocks + 1e-9)}
        assert resident(blocks, room) == set(range(blocks)) - streamed


def test_as_many_stay_as_there_is_room_for_and_the_first_does():
    for blocks, room in SIZES:
        stays = resident(blocks, room)
        assert len(stays) == min(room, blocks)
        assert not stays or 0 in stays


def test_every_stretch_of_blocks_streams_its_share():
    """Evenly: any w blocks in a row hold the floor or the ceiling of w·S / L streamed ones, also across the end of a pass."""
    for blocks, room in SIZES:
        swapped = blocks - min(room, blocks)
        flags = [i not in resident(blocks, room) for i in range(blocks)] * 2
        for width in range(1, blocks + 1):
            share = width * swapped
            for start in range(blocks):
                assert share // blocks <= sum(flags[start : start + width]) <= -(-share // blocks)


def fast_bytes(sizes: list[int], count: int, slots: int, slack: int, staging: int = 0) -> int:
    """Bytes on the fast tier when `count` blocks stay in BMInf's pattern."""
    stays = resident(len(sizes), count)
    streamed = [size for position, size in enumerate(sizes) if position not in stays]
    if not streamed:
        return sum(sizes)
    return sum(sizes) - sum(streamed) + min(slots, len(streamed)) * (max(streamed) + slack) + staging


def test_unequal_blocks_keep_as_many_as_the_room_holds():
    random.seed(3)
    for _ in range(3000):
        sizes = [random.randint(1, 40) for _ in range(random.randint(1, 12))]
        slots, slack, staging, room = random.choice([2, 3]), random.choice([0, 4]), random.choice([0, 9]), random.randint(0, 260)
        settled = settle(sizes, "ram", {"ram": room, "disk": 10**6}, slots, slack, staging)
        possible = [count for count in range(len(sizes) + 1) if fast_bytes(sizes, count, slots, slack, staging) <= room]
        if not possible:
            assert settled is None
            continue
        assert settled is not None
        stays = resident(len(sizes), max(possible))
        assert settled.homes == tuple("ram" if position in stays else "disk" for position in range(len(sizes)))
        assert settled.streamed == tuple(position for position in range(len(sizes)) if position not in stays)
        assert settled.fast_bytes == fast_bytes(sizes, len(stays), slots, slack, staging) <= room
        assert not settled.streamed or 2 <= settled.slots <= slots
        assert all(sizes[position] + slack <= settled.slot_bytes for position in settled.streamed)


def test_what_loading_and_running_take_besides_is_left_free():
    """Four blocks of 10. Running: k residents, two slots and 5 beside. Loading: k residents, the block that is read and 12."""
    for room in range(80):
        settled = settle([10] * 4, "ram", {"ram": room, "disk": 100}, slots=2, slack=0, beside=5, scratch=12)
        possible = [count for count in range(4) if max(10 * count + 20 + 5, 10 * count + 10 + 12) <= room] + [4] * (
            max(40 + 5, 40 + 12) <= room
        )
        assert (settled is None) == (not possible)
        if settled is not None:
            assert settled.homes.count("ram") == max(possible)
            assert (settled.fast_bytes, settled.loading_bytes) == (
                (40, 40) if not settled.streamed else (10 * max(possible) + 20, 10 * max(possible) + 10)
            )


@pytest.mark.parametrize(("room", "homes"), [(40, "rrrr"), (39, "rdrd"), (30, "rddd"), (29, "dddd"), (20, "dddd")])
def test_equal_blocks_by_hand(room, homes):
    """Four blocks of 10 and two slots: k residents take 10·k + 20."""
    expected = {40: "rrrr", 39: "rddd", 30: "rddd", 29: "dddd", 20: "dddd"}[room]
    settled = settle([10] * 4, "ram", {"ram": room, "disk": 100}, slots=2, slack=0)
    assert settled is not None
    assert "".join(home[0] for home in settled.homes) == expected


def test_no_room_for_the_slots_is_no_residency():
    assert settle([10] * 4, "ram", {"ram": 19, "disk": 100}, slots=2, slack=0) is None
    assert settle([10] * 4, "ram", {"ram": -1, "disk": 100}, slots=2, slack=0) is None


def test_no_room_on_the_disk_is_no_residency():
    assert settle([10] * 4, "ram", {"ram": 30, "disk": 29}, slots=2, slack=0) is None
    assert settle([10] * 4, "ram", {"ram": 40, "disk": 0}, slots=2, slack=0) is not None


@pytest.mark.parametrize(
    ("ram", "disk", "homes"),
    [
        (60, 0, "gpu ram ram gpu ram ram gpu ram ram"),
        (20, 40, "gpu disk ram gpu disk disk gpu ram disk"),
        (0, 60, "gpu disk disk gpu disk disk gpu disk disk"),
    ],
)
def test_a_gpu_fills_ram_before_disk(ram, disk, homes):
    settled = settle([10] * 9, "gpu", {"gpu": 50, "ram": ram, "disk": disk}, slots=2, slack=0)
    assert settled is not None
    assert sorted(settled.homes) == sorted(homes.split())
    assert [home == "gpu" for home in settled.homes] == [home == "gpu" for home in homes.split()]


@pytest.mark.parametrize(("ram", "disk"), [(59, 0), (0, 59), (29, 29), (-1, 100)])
def test_a_gpu_without_room_behind_it_has_no_residency(ram, disk):
    assert settle([10] * 9, "gpu", {"gpu": 50, "ram": ram, "disk": disk}, slots=2, slack=0) is None


def test_a_gpu_that_holds_all_needs_nothing_behind_it():
    settled = settle([10] * 9, "gpu", {"gpu": 90, "ram": 0, "disk": 0}, slots=2, slack=0)
    assert settled is not None
    assert settled.homes == ("gpu",) * 9


def test_rooms_of_three_tiers_are_kept():
    random.seed(5)
    found = 0
    for _ in range(3000):
        sizes = [random.randint(1, 40) for _ in range(random.randint(1, 12))]
        room = {"gpu": random.randint(0, 200), "ram": random.randint(-20, 150), "disk": random.randint(0, 150)}
        settled = settle(sizes, "gpu", room, slots=2, slack=3)
        if settled is None:
            continue
        found += 1
        held = {tier: sum(size for size, home in zip(sizes, settled.homes, strict=True) if home == tier) for tier in room}
        assert settled.fast_bytes <= room["gpu"]
        assert held["ram"] <= max(0, room["ram"])
        assert held["disk"] <= room["disk"]
        assert {position for position, home in enumerate(settled.homes) if home != "gpu"} == set(settled.streamed)
    assert found > 500
