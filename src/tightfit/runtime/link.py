"""Link: the ways of a block's bytes into its slot, and who must wait for whom on the way."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from tightfit.runtime.direct import DirectFiles, Piece, aligned_empty
from tightfit.terms.errors import TightfitError


class Link(Protocol):
    """Copies into slots. An *event* is a moment that can be waited for; what is done when it returns has none."""

    @property
    def seconds_waited(self) -> float:
        """How long the computation stood still for copies, beside what the host waited."""
        ...

    def mark(self) -> Any:
        """The moment until which the computation, as far as it is asked for by now, uses its slot."""
        ...

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Any) -> Any:
        """Copy each (target, source), not before the event `after`. Returns the event of their arrival."""
        ...

    def wait(self, event: Any) -> None:
        """Let the computation wait for `event`."""
        ...

    def settle(self, event: Any) -> None:
        """Let the host wait for `event`."""
        ...

    def close(self) -> None:
        """Wait for all copies: their slots are about to be given up."""
        ...


class CpuLink:
    """Copies inside RAM. They are done when they return, and a block is done when the next one begins: there are no events."""

    seconds_waited = 0.0

    def mark(self) -> None:
        """No event."""

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: None) -> None:
        """By numpy, because torch would start a second team of threads from a reader."""
        for target, source in pairs:
            target.numpy()[:] = source.numpy()

    def wait(self, event: None) -> None:
        """Nothing to wait for."""

    def settle(self, event: None) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to wait for."""


class CudaLink:
    """Copies on a CUDA stream of their own, kept apart from the computation's by events alone.

    A copy waits until its slot is used no more, and the computation waits until its block has come. The slots outlive both,
    so `record_stream`, which would hold memory back, is not needed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying = torch.cuda.Stream(device)
        self._waits: deque[tuple[Any, Any]] = deque()
        self._seconds_waited = 0.0

    @property
    def seconds_waited(self) -> float:
        """How long the computation's stream stood still for copies, as far as the GPU has come."""
        while self._waits and self._waits[0][1].query():
            began, ended = self._waits.popleft()
            self._seconds_waited += began.elapsed_time(ended) / 1000
        return self._seconds_waited

    def mark(self) -> Any:
        """An event behind all that the computation has queued."""
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Any) -> Any:
        """Queue the copies behind `after`; sources are pinned. Returns an event behind them."""
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(after)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._copying.record_event()

    def wait(self, event: Any) -> None:
        """Let the computation's stream wait for `event`; the host goes on. The wait is timed when there is one."""
        if event.query():
            return
        computing = torch.cuda.current_stream(self._device)
        began = computing.record_event(torch.cuda.Event(enable_timing=True))
        computing.wait_event(event)
        self._waits.append((began, computing.record_event(torch.cuda.Event(enable_timing=True))))
        _ = self.seconds_waited  # takes up the waits that have ended, so that the row stays short

    def settle(self, event: Any) -> None:
        """Let the host wait for `event`."""
        event.synchronize()

    def close(self) -> None:
        """Let the host wait for all copies."""
        self._copying.synchronize()


def read_in_place(files: DirectFiles, piece: Piece, flat: Tensor) -> tuple[int, None]:
    """Read `piece` straight to where it belongs in the slot `flat`. Returns (bytes, no event)."""
    target = memoryview(flat.numpy())[piece.slot_offset : piece.slot_offset + piece.length]
    return files.read(piece.file, piece.file_offset, target, piece.needed_bytes), None


def read_staged(files: DirectFiles, piece: Piece, flat: Tensor, buffers: "SimpleQueue[Tensor]", link: Link, after: Any) -> tuple[int, Any]:
    """Read `piece` into one of `buffers` (as many as there are readers) and copy its tensors' bytes from there into the slot `flat`."""
    buffer = buffers.get()
    try:
        count = files.read(piece.file, piece.file_offset, memoryview(buffer.numpy())[: piece.length], piece.needed_bytes)
        pairs = [(flat[target : target + nbytes], buffer[source : source + nbytes]) for source, target, nbytes in piece.moves]
        event = link.copy(pairs, after)
        link.settle(event)  # before the next piece comes into this buffer
    finally:
        buffers.put(buffer)
    return count, event


def copy_source(source: Tensor, flat: Tensor, link: Link, after: Any) -> tuple[int, Any]:
    """Copy a block that rests in RAM into the slot `flat`."""
    return source.numel(), link.copy([(flat[: source.numel()], source)], after)


@contextmanager
def pinned_empty(nbytes: int) -> Iterator[Tensor]:
    """Pinned RAM of exactly `nbytes`, as long as the context lasts: torch's own pinned memory is rounded up to a power of two.

    # → (nbytes,) uint8. Raises `TightfitError` when the driver refuses.
    """
    flat, driver = aligned_empty(nbytes), torch.cuda.cudart()
    if fault := int(driver.cudaHostRegister(flat.data_ptr(), nbytes, 0)):
        raise TightfitError(
            f"the driver does not pin {nbytes} bytes of RAM (error {fault})", hint="raise `ulimit -l`, or plan with less `--ram`"
        )
    try:
        yield flat
    finally:
        driver.cudaHostUnregister(flat.data_ptr())
