"""Residency: decide which blocks rest in fast memory, so that copies hide behind compute.

With equal blocks, compute time c and copy time t each, a pass over L blocks of which S are streamed takes max(L·c, S·t)
when the streamed ones are spread evenly, and more when they stand together (BMInf's schedule).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Residency:
    """Where each block rests by position; `streamed` ones take turns in `slots` slots of `slot_bytes` on the fast tier."""

    homes: tuple[str, ...]
    streamed: tuple[int, ...]
    slots: int
    slot_bytes: int
    fast_bytes: int  # residents, slots and the readers' buffers together


def resident(blocks: int, room: int) -> set[int]:
    """Which `room` of `blocks` equal blocks stay, spread evenly; the first stays if any does, so its pass hides the first copy.

    >>> sorted(resident(blocks=4, room=2))
    [0, 2]
    """
    swapped = blocks - min(room, blocks)
    return {i for i in range(blocks) if (i + 1) * swapped // blocks == i * swapped // blocks}


def settle(block_bytes: Sequence[int], fast: str, room: Mapping[str, int], slots: int, slack: int, staging: int = 0) -> Residency | None:
    """The residency that keeps most blocks on the `fast` tier within `room` (bytes by tier), or None if not even the slots fit.

    What does not stay goes to RAM while there is room (when computing on a GPU), the rest to disk, both spread evenly.
    A slot is as large as the largest streamed block, and `slack` bytes for alignment; `staging` bytes are needed beside the
    slots as soon as any block streams.
    """
    for count in range(len(block_bytes), -1, -1):
        stays = resident(len(block_bytes), count)
        streamed = [position for position in range(len(block_bytes)) if position not in stays]
        slot_bytes = max((block_bytes[position] for position in streamed), default=0) + (slack if streamed else 0)
        used_slots = min(slots, len(streamed)) if streamed else 0
        fast_bytes = sum(block_bytes[position] for position in stays) + used_slots * slot_bytes + (staging if streamed else 0)
        if fast_bytes <= room[fast]:
            homes = _second_homes(block_bytes, streamed, fast, room)
            if homes is None:
                continue
            whole = tuple(fast if position in stays else homes[position] for position in range(len(block_bytes)))
            return Residency(whole, tuple(streamed), used_slots, slot_bytes, fast_bytes)
    return None


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
