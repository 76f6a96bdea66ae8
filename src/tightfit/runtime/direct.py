"""Direct: bytes of files into memory past the page cache, by few threads that can be stopped at once."""

import errno
import logging
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

import torch
from torch import Tensor

from tightfit.formats.image import PAGE_BYTES, BlockImage, file_fault
from tightfit.terms.errors import TightfitError

_LINUX = sys.platform == "linux"
_DIRECT = os.O_DIRECT if _LINUX else 0
_PAST_CACHE = "`%s` lies on a file system without direct reads (tmpfs, some network disks): it is read through the page cache"

log = logging.getLogger(__name__)


def aligned_empty(nbytes: int, pin_memory: bool = False) -> Tensor:
    """Memory that direct reads can fill: it starts on a page, and torch's allocator knows of it.  # → (nbytes,) uint8"""
    with torch.inference_mode(False):
        flat = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pin_memory)
        if flat.data_ptr() % PAGE_BYTES:  # pinned memory starts on a page already, and a byte more would double it
            flat = torch.empty(nbytes + PAGE_BYTES, dtype=torch.uint8, pin_memory=pin_memory)
            start = -flat.data_ptr() % PAGE_BYTES
            flat = flat[start : start + nbytes]
        return flat


@dataclass(frozen=True)
class Piece:
    """What one request reads: a part of a segment, and where the tensors' bytes in it go.

    `slot_offset` is where the piece lies in the image; `moves` are (offset in the piece, offset in the layout, bytes).
    """

    file: str
    file_offset: int
    length: int
    slot_offset: int
    moves: tuple[tuple[int, int, int], ...]

    @property
    def needed_bytes(self) -> int:
        """Bytes that must come; those after them belong to nobody."""
        return max((start + nbytes for start, _, nbytes in self.moves), default=0)


def pieces(image: BlockImage, layout: BlockImage, piece_bytes: int) -> Iterator[Piece]:
    """Cut the segments of `image` into pieces of at most `piece_bytes`, to fill a slot laid out as `layout` (the same tensors)."""
    places = zip(image.tensors, layout.tensors, strict=True)
    spans = sorted({(source.offset, target.offset, source.nbytes) for source, target in places})
    ends = list(accumulate((start + nbytes for start, _, nbytes in spans), max))
    for segment in image.segments:
        for done in range(0, segment.length, piece_bytes):
            length = min(piece_bytes, segment.length - done)
            low = segment.slot_offset + done
            moves = []
            for start, target, nbytes in spans[bisect_right(ends, low) :]:
                if start >= low + length:
                    break
                first, last = max(start, low), min(start + nbytes, low + length)
                if first < last:
                    moves.append((first - low, target + first - start, last - first))
            yield Piece(segment.file, segment.file_offset + done, length, low, tuple(moves))


class DirectFiles:
    """Files open for reading. Several threads may read at once; each file is opened when it is first read."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._open: dict[str, int] = {}
        self._cached: set[str] = set()

    def read(self, file: str, offset: int, target: memoryview, needed_bytes: int) -> int:
        """Fill `target` from `offset` on, up to the end of the file, and return the bytes read.

        `offset`, the length of `target` and its address are multiples of `PAGE_BYTES`. Raises `TightfitError` when the file
        cannot be read or ends before `needed_bytes`.
        """
        try:
            count = self._read(file, offset, target)
        except OSError as fault:
            raise file_fault("read", file, fault) from fault
        if count < needed_bytes:
            size = os.fstat(self._descriptor(file)).st_size
            raise TightfitError(
                f"`{file}` ends at byte {size}; its weights go on to byte {offset + needed_bytes} or further",
                hint="the file is cut short: download or convert it again",
            )
        return count

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def _read(self, file: str, offset: int, target: memoryview) -> int:
        done = 0
        while done < len(target):
            descriptor, direct = self._descriptor(file), file not in self._cached
            try:
                count = os.preadv(descriptor, [target[done:]], offset + done)
            except OSError as fault:
                if fault.errno != errno.EINVAL or not direct:
                    raise
                self._reopen_cached(file)
                continue
            if not direct and _LINUX:
                os.posix_fadvise(descriptor, offset + done, count, os.POSIX_FADV_DONTNEED)
            done += count
            if count == 0 or offset + done >= os.fstat(descriptor).st_size:
                break
        return done

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._open:
                try:
                    self._open[file] = os.open(file, os.O_RDONLY | _DIRECT)
                except OSError as fault:
                    if fault.errno != errno.EINVAL or not _DIRECT:
                        raise
                    self._open_cached(file)
            return self._open[file]

    def _reopen_cached(self, file: str) -> None:
        """A file system may take a direct open and refuse the read. The other thread may have seen that first."""
        with self._lock:
            if file not in self._cached:
                self._open_cached(file)

    def _open_cached(self, file: str) -> None:
        if not self._cached:
            log.warning(_PAST_CACHE, file)
        descriptor = os.open(file, os.O_RDONLY)
        if file in self._open:
            os.dup2(descriptor, self._open[file], inheritable=False)  # another thread may be about to read from the old number
            os.close(descriptor)
        else:
            self._open[file] = descriptor
        self._cached.add(file)


class Readers:
    """Daemon threads that do what they are asked, in that order. They hold nothing but their queue, and never keep Python alive."""

    def __init__(self, count: int) -> None:
        self._queue: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        self._threads = [Thread(target=_work, args=(self._queue,), name=f"tightfit-reader-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def ask(self, deed: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Do `deed(*arguments)` in a thread. The future can be cancelled until it begins."""
        future: Future[Any] = Future()
        self.fulfil(future, deed, *arguments)
        return future

    def fulfil(self, future: "Future[Any]", deed: Callable[..., Any], *arguments: Any) -> None:
        """As `ask`, with a future that the caller has noted already: no interrupt can hide it."""
        self._queue.put((future, deed, arguments))

    def close(self) -> None:
        """Give up what has not begun, wait for what has, and end the threads."""
        with suppress(Empty):
            while (task := self._queue.get_nowait()) is not None:
                task[0].cancel()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()


def _work(queue: "SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]") -> None:
    while (task := queue.get()) is not None:
        future, deed, arguments = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(deed(*arguments))
            except BaseException as fault:  # raised again where the result is wanted
                future.set_exception(fault)
        del task, future, deed, arguments  # a waiting thread would keep the last slot alive
