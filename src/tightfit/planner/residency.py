"""Residency: decide which blocks rest in fast memory, so that copies hide behind compute.

With equal blocks, compute time c and copy time t each, a pass over L blocks of which S are streamed takes max(L·c, S·t)
when the streamed ones are spread evenly, and more when they stand together (BMInf's schedule).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Residency:
    """Where each block rests by position; `streamed` ones take turns in `slots` slots of `slot_bytes` on the fast tier."""

    homes: tuple[str, ...]
    streamed: tuple[int, ...]
    slots: int
    slot_bytes: int
    fast_bytes: int  # residents, slots and the readers' buffers together
    loading_bytes: int  # residents and one block that is read before it streams; slots are made after all is read


def resident(blocks: int, room: int) -> set[int]:
    """Which `room` of `blocks` equal blocks stay, spread evenly; the first stays if any does, so its pass hides the first copy.

    >>> sorted(resident(blocks=4, room=2))
    [0, 2]
    """
    swapped = blocks - min(room, blocks)
    return {i for i in range(blocks) if (i + 1) * swapped // blocks == i * swapped // blocks}


def settle(
    block_bytes: Sequence[int],
    fast: str,
    room: Mapping[str, int],
    slots: int,
    slack: int,
    staging: int = 0,
    beside: int = 0,
    scratch: int = 0,
) -> Residency | None:
    """The residency that keeps most blocks on the `fast` tier within `room` (bytes by tier), or None if not even the slots fit.

    What does not stay goes to RAM while there is room (when computing on a GPU), the rest to disk, both spread evenly.
    A slot is as large as the largest streamed block, and `slack` bytes for alignment; `staging` bytes are needed beside the
    slots as soon as any block streams. Running takes `beside` bytes of the fast tier beside the blocks, loading `scratch`.
    """
    for count in range(len(block_bytes), -1, -1):
        settled = _keeping(count, block_bytes, fast, slots, slack, staging)
        if max(settled.fast_bytes + beside, settled.loading_bytes + scratch) <= room[fast]:
            homes = _homes(settled, block_bytes, fast, room)
            if homes is not None:
                return replace(settled, homes=homes)
    return None


def least(
    block_bytes: Sequence[int],
    fast: str,
    room: Mapping[str, int],
    slots: int,
    slack: int,
    staging: int = 0,
    beside: int = 0,
    scratch: int = 0,
) -> Residency:
    """The residency that needs the fewest bytes of the `fast` tier; behind it RAM is kept to `room`, and the disk is endless."""
    found = (_keeping(count, block_bytes, fast, slots, slack, staging) for count in range(len(block_bytes) + 1))
    lowest = min(found, key=lambda residency: max(residency.fast_bytes + beside, residency.loading_bytes + scratch))
    return replace(lowest, homes=_homes(lowest, block_bytes, fast, behind(room, fast)) or lowest.homes)


def behind(room: Mapping[str, int], fast: str) -> dict[str, int]:
    """`room` as it is on the `fast` tier, with an endless disk, and with RAM behind a GPU for what runs there besides."""
    return {**room, "disk": 1 << 62} | ({"ram": max(0, room["ram"])} if fast == "gpu" else {})


def _keeping(count: int, block_bytes: Sequence[int], fast: str, slots: int, slack: int, staging: int) -> Residency:
    """`count` blocks stay, the others stream from disk."""
    stays = resident(len(block_bytes), count)
    streamed = tuple(position for position in range(len(block_bytes)) if position not in stays)
    held = sum(block_bytes[position] for position in stays)
    homes = tuple(fast if position in stays else "disk" for position in range(len(block_bytes)))
    if not streamed:
        return Residency(homes, (), 0, 0, held, held)
    used_slots, slot_bytes = min(slots, len(streamed)), max(block_bytes[position] for position in streamed) + slack
    return Residency(homes, streamed, used_slots, slot_bytes, held + used_slots * slot_bytes + staging, held + slot_bytes)


def _homes(residency: Residency, block_bytes: Sequence[int], fast: str, room: Mapping[str, int]) -> tuple[str, ...] | None:
    """Every block's tier; None when what streams finds no room behind `fast`."""
    second = _second_homes(block_bytes, residency.streamed, fast, room)
    return None if second is None else tuple(second.get(position, fast) for position in range(len(block_bytes)))


def _second_homes(block_bytes: Sequence[int], streamed: Sequence[int], fast: str, room: Mapping[str, int]) -> dict[int, str] | None:
    """RAM or disk for each streamed block; None when the disk has no room for the rest, or RAM not even for what runs there besides."""
    for count in range(len(streamed) if fast == "gpu" else 0, -1, -1):
        kept = {streamed[place] for place in resident(len(streamed), count)}
        rest = [position for position in streamed if position not in kept]
        if sum(block_bytes[position] for position in kept) <= room.get("ram", 0):
            if sum(block_bytes[position] for position in rest) > room.get("disk", 0):
                return None
            return {position: "ram" if position in kept else "disk" for position in streamed}
    return None
