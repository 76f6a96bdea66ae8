"""Stream: blocks that take turns in few slots of fast memory. Fetch the next, run this one, release the last.

After BMInf's two-buffer schedule (ACL 2022 demo, and its code's `TransformerBlockList`), with three changes: the order of visits
is learned, so the backward pass and encoder–decoder models are foreseen too; blocks may differ; and weights may come straight from
the model's files. One forward pass at a time: two at once would take the weights from each other, block by block.
"""

import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.formats.image import PIECE_BYTES, READERS, BlockImage, bind, packed, unbind
from tightfit.runtime.direct import DirectFiles, Readers, aligned_empty, pieces
from tightfit.runtime.link import CpuLink, CudaLink, Link, copy_source, read_in_place, read_staged
from tightfit.terms.errors import TightfitError


@dataclass(frozen=True)
class Traffic:
    """What a stream has moved so far: bytes that came into slots, blocks fetched, and how long the computation waited for them.

    Fed from disk to a GPU, `seconds_waited` is the host's waiting, part of which the GPU may have spent computing.
    """

    bytes_moved: int
    reads: int
    seconds_waited: float


class Visits:
    """Foresees which block comes next: the one that followed this same step last time, else the neighbour in the same direction."""

    def __init__(self, positions: Iterable[int]) -> None:
        self._positions = sorted(positions)
        self._after: dict[tuple[int | None, int], int] = {}
        self._step: tuple[int | None, int] | None = None

    def visit(self, position: int) -> None:
        """The block at `position` begins. Keyed by two visits, for forward and backward passes leave a block to different sides."""
        if self._step is not None:
            self._after[self._step] = position
        self._step = (self._step[1] if self._step else None, position)

    def ahead(self, count: int) -> list[int]:
        """The next `count` positions, most likely order."""
        step, found = self._step, []
        for _ in range(count):
            position = self._positions[0] if step is None else self._after[step] if step in self._after else self._guess(*step)
            step = (step[1] if step else None, position)
            found.append(position)
        return found

    def _guess(self, before: int | None, here: int) -> int:
        """The lower neighbour after a step to a lower neighbour, else the higher one; after the last comes the first.

        A jump down is no backward pass: a decoder begins its next token, or the model its next pass.
        """
        lower, higher = bisect_left(self._positions, here) - 1, bisect_right(self._positions, here)
        if lower >= 0 and higher < len(self._positions) and before == self._positions[higher]:
            return self._positions[lower]
        return self._positions[higher % len(self._positions)]


@dataclass
class _Slot:
    """A place for one block. Each future in `arriving` gives (bytes, event); `used` is the event after which it may be overwritten."""

    flat: Tensor  # (slot_bytes,) uint8
    used: Any
    position: int | None = None
    arriving: list["Future[tuple[int, Any]]"] = field(default_factory=list)

    @property
    def is_filling(self) -> bool:
        """Whether bytes are still to come, for its block or for a dropped one."""
        return not all(future.done() for future in self.arriving)

    def landed_bytes(self) -> int:
        """Bytes that came so far for this or a dropped block."""
        ended = [future for future in self.arriving if future.done() and not future.cancelled() and not future.exception()]
        return sum(future.result()[0] for future in ended)

    def ask(self, readers: Readers, deed: Callable[..., Any], *arguments: Any) -> None:
        """Let a reader bring bytes here. Noted before it is asked: nobody would wait for a piece that an interrupt hides."""
        future: Future[Any] = Future()
        self.arriving.append(future)
        readers.fulfil(future, deed, *arguments)

    def drop(self) -> None:
        """Give up what has not begun to arrive. One piece per reader may still come."""
        self.position = None
        for future in self.arriving:
            future.cancel()

    def settle(self) -> None:
        """Wait until nobody writes here."""
        for future in self.arriving:
            if not future.cancelled():
                future.exception()


class Stream:
    """A `Ring` over `blocks` (by position): each is fetched by its image into one of `slots` slots on `device` before it runs.

    A block comes from `sources` (flat uint8 tensors laid out as its image, pinned where `device` is a GPU), else from the files
    in its image's segments. From construction on the blocks hold no weights but those of the one that runs.
    `acquire` raises `TightfitError` when a file cannot be read or is cut short. Memory: `memory()`.
    """

    PIECE_BYTES = PIECE_BYTES
    READERS = READERS

    def __init__(
        self,
        blocks: Mapping[int, nn.Module],
        images: Mapping[int, BlockImage],
        slots: int,
        device: torch.device | str,
        sources: Mapping[int, Tensor] | None = None,
    ) -> None:
        if slots < 2:
            raise TightfitError(f"a stream needs two slots, one to run and one to fill; it was given {slots}", hint="ask for `slots=2`")
        self._blocks, self._images, self._sources = dict(blocks), dict(images), dict(sources or {})
        self._device = torch.device(device)
        self._link: Link = CudaLink(self._device) if self._device.type == "cuda" else CpuLink()
        self._layouts = {position: self._layout(position) for position in self._blocks}
        for position, block in self._blocks.items():
            unbind(block, self._layouts[position], self._device)
        self._slots = self._make_slots(min(slots, len(self._blocks)))
        self._buffers = self._make_buffers()
        self._free_buffers: SimpleQueue[Tensor] = SimpleQueue()
        for buffer in self._buffers:
            self._free_buffers.put(buffer)
        self._visits = Visits(self._blocks)
        self._running: int | None = None
        self._moved_bytes, self._reads, self._seconds_waited = 0, 0, 0.0
        self._files, self._readers = DirectFiles(), Readers(self.READERS)
        self._finish = weakref.finalize(self, _finish, self._slots, self._readers, self._files, self._link)
        self._fetch_all(self._visits.ahead(len(self._slots)))  # they come while the embedding is computed

    def acquire(self, position: int) -> None:
        """Make the weights of the block at `position` usable, and give up those of the block acquired before."""
        if position == self._running:
            return
        if not self._finish.alive:
            raise TightfitError(f"the stream is closed, so block {position} has no weights any more", hint="build the model again")
        self._release()  # the last one
        self._visits.visit(position)
        self._fetch_all([position, *self._visits.ahead(len(self._slots) - 1)])  # this one, unless it was foreseen, and the next
        slot = self._arrived(position)
        bind(self._blocks[position], self._layouts[position], slot.flat)  # it runs when we return, while the next ones come
        self._running = position

    def traffic(self) -> Traffic:
        """What was moved so far."""
        moved_bytes = self._moved_bytes + sum(slot.landed_bytes() for slot in self._slots)
        return Traffic(moved_bytes, self._reads, self._seconds_waited + self._link.seconds_waited)

    def memory(self) -> list[Tensor]:
        """The slots and, where files do not hold the tensors as they are wanted, the readers' buffers: all that the stream holds."""
        return [*(slot.flat for slot in self._slots), *self._buffers]

    def close(self) -> None:
        """Stop reading, close the files and give up the slots; the blocks are left without weights. May be called twice."""
        if self._finish.alive:
            self._release()
            self._finish()
            self._moved_bytes = self.traffic().bytes_moved
            self._slots.clear()
            self._buffers.clear()
            self._free_buffers = SimpleQueue()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_fault: object) -> None:
        self.close()

    def _release(self) -> None:
        """The block that ran gives its weights up; they stay in their slot until another block needs it."""
        if self._running is None:
            return
        position = self._running
        self._slot_of(position).used = self._link.mark()
        self._running = None  # before its weights go, so that a block that an interrupt leaves empty is never taken for one that runs
        unbind(self._blocks[position], self._layouts[position], self._device)

    def _fetch_all(self, wanted: list[int]) -> None:
        """Let these blocks arrive, in this order, and nothing else: wrong guesses would only hold them up."""
        for slot in self._slots:
            if slot.position not in wanted and slot.is_filling:
                slot.drop()
        for position in dict.fromkeys(wanted):
            if all(slot.position != position for slot in self._slots):
                self._fetch(position, next(slot for slot in self._slots if slot.position not in wanted))

    def _fetch(self, position: int, slot: _Slot) -> None:
        """Let the block arrive in `slot`, once nobody else writes there."""
        slot.position = None
        slot.settle()
        self._moved_bytes += slot.landed_bytes()
        slot.arriving = []
        self._reads += 1
        image, layout = self._images[position], self._layouts[position]
        if position in self._sources:
            slot.ask(self._readers, copy_source, self._sources[position], slot.flat, self._link, slot.used)
        else:
            for piece in pieces(image, layout, self.PIECE_BYTES):
                if layout is image:
                    slot.ask(self._readers, read_in_place, self._files, piece, slot.flat)
                else:
                    slot.ask(self._readers, read_staged, self._files, piece, slot.flat, self._free_buffers, self._link, slot.used)
        slot.position = position  # last: what an interrupt leaves half asked for is nobody's, and dropped before the slot is filled again

    def _arrived(self, position: int) -> _Slot:
        """The slot of the block, when all of it has come."""
        slot = self._slot_of(position)
        began = perf_counter()
        try:
            for future in slot.arriving:
                self._link.wait(future.result()[1])
        except BaseException:
            slot.drop()  # so that it is read again if it is wanted again
            raise
        finally:
            self._seconds_waited += perf_counter() - began
        return slot

    def _slot_of(self, position: int) -> _Slot:
        return next(slot for slot in self._slots if slot.position == position)

    def _layout(self, position: int) -> BlockImage:
        """How the block lies in its slot: as in its source or file when it can go straight into place, else packed."""
        image = self._images[position]
        if position in self._sources or (self._device.type == "cpu" and image.is_aligned):
            return image
        return packed(image)

    def _make_slots(self, count: int) -> list[_Slot]:
        nbytes = max(layout.slot_bytes for layout in self._layouts.values())
        if self._device.type == "cpu":
            return [_Slot(aligned_empty(nbytes), self._link.mark()) for _ in range(count)]
        return [_Slot(torch.empty(nbytes, dtype=torch.uint8, device=self._device), self._link.mark()) for _ in range(count)]

    def _make_buffers(self) -> list[Tensor]:
        """One for each reader, when some block cannot go straight into its slot."""
        staged = [position for position in self._blocks if self._layouts[position] is not self._images[position]]
        lengths = [segment.length for position in staged for segment in self._images[position].segments]
        if not lengths:
            return []
        nbytes = min(self.PIECE_BYTES, max(lengths))
        return [aligned_empty(nbytes, pin_memory=self._device.type == "cuda") for _ in range(self.READERS)]


def _finish(slots: list[_Slot], readers: Readers, files: DirectFiles, link: Link) -> None:
    """Also run when a stream is forgotten or Python ends, so it knows nothing of the stream and its blocks."""
    for slot in slots:
        slot.drop()
    readers.close()
    files.close()
    link.close()
