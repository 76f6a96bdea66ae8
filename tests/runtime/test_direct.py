"""Direct reads: every byte, at every odd end; file systems that refuse them; faults; threads and descriptors that go away."""

import errno
import fcntl
import gc
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from tightfit.formats.image import BlockImage, Segment, TensorView, image_of, packed
from tightfit.runtime import direct
from tightfit.runtime.direct import DirectFiles, Piece, Readers, aligned_empty, pieces
from tightfit.terms.errors import TightfitError


@pytest.fixture
def files():
    opened = DirectFiles()
    yield opened
    opened.close()


def target(nbytes: int) -> memoryview:
    return memoryview(aligned_empty(nbytes).numpy())


def write(path, nbytes: int) -> bytes:
    data = random.Random(nbytes).randbytes(nbytes)
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 123_457])
def test_aligned_memory(nbytes):
    flat = aligned_empty(nbytes)
    assert flat.shape == (nbytes,) and flat.dtype == torch.uint8 and flat.data_ptr() % 4096 == 0
    with torch.inference_mode():
        assert not aligned_empty(8).is_inference()


@pytest.mark.parametrize("size", [1, 4096, 8191, 8192, 8193, 20_000])
def test_reads_up_to_the_end_of_the_file(tmp_path, files, size):
    data = write(tmp_path / "f", size)
    for offset in (0, 4096, 8192):
        room = target(12288)
        count = files.read(str(tmp_path / "f"), offset, room, max(0, min(12288, size - offset)))
        assert bytes(room[:count]) == data[offset : offset + 12288]


def test_files_are_opened_for_direct_reads_once(tmp_path, files, monkeypatch):
    write(tmp_path / "f", 8192)
    flags = []
    real = os.open
    monkeypatch.setattr(direct.os, "open", lambda file, how: flags.append(how) or real(file, how))
    files.read(str(tmp_path / "f"), 0, target(4096), 4096)
    assert flags.pop(0) == os.O_RDONLY | os.O_DIRECT
    flags.clear()  # where the tests' folder refuses direct reads, a second way of opening came here
    files.read(str(tmp_path / "f"), 4096, target(4096), 4096)
    assert flags == []


@pytest.mark.parametrize("refusing", ["open", "preadv"])
def test_file_systems_without_direct_reads_are_read_through_the_cache(tmp_path, files, monkeypatch, caplog, refusing):
    data = [write(tmp_path / name, 10_000 + size) for size, name in enumerate("fg")]
    dropped, real_open, real_preadv = [], os.open, os.preadv

    def opening(file, how):
        if refusing == "open" and how & os.O_DIRECT:
            raise OSError(errno.EINVAL, "refused")
        return real_open(file, how)

    def reading(descriptor, buffers, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "refused")
        return real_preadv(descriptor, buffers, offset)

    monkeypatch.setattr(direct.os, "open", opening)
    monkeypatch.setattr(direct.os, "preadv", reading)
    monkeypatch.setattr(direct.os, "posix_fadvise", lambda *what: dropped.append(what[1:]))
    for name, expected in zip("fg", data, strict=True):
        for _ in range(2):
            room = target(12288)
            count = files.read(str(tmp_path / name), 0, room, len(expected))
            assert bytes(room[:count]) == expected
    assert dropped == [(0, count, os.POSIX_FADV_DONTNEED) for count in (10_000, 10_000, 10_001, 10_001)]
    assert len(caplog.records) == 1 and "page cache" in caplog.text


def test_two_threads_that_find_direct_reads_refused_at_once(tmp_path, files, monkeypatch):
    """The second must not take its own refusal for a fault, after the first has changed the file to cached reads."""
    data = write(tmp_path / "f", 8192)
    both, real = threading.Barrier(2, timeout=10), os.preadv

    def reading(descriptor, buffers, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            both.wait()
            raise OSError(errno.EINVAL, "refused")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(direct.os, "preadv", reading)
    readers = Readers(2)
    rooms = [target(4096), target(4096)]
    counts = [readers.ask(files.read, str(tmp_path / "f"), 4096 * n, room, 4096) for n, room in enumerate(rooms)]
    assert [count.result(10) for count in counts] == [4096, 4096]
    assert b"".join(map(bytes, rooms)) == data
    readers.close()


def test_interrupted_reads_go_on_where_they_stopped(tmp_path, files, monkeypatch):
    data, real = write(tmp_path / "f", 20_480), os.preadv
    monkeypatch.setattr(direct.os, "preadv", lambda descriptor, buffers, offset: real(descriptor, [buffers[0][:4096]], offset))
    room = target(20_480)
    assert files.read(str(tmp_path / "f"), 0, room, 20_480) == 20_480 and bytes(room) == data


def test_missing_truncated_and_unreadable_files_are_named(tmp_path, files, monkeypatch):
    with pytest.raises(TightfitError, match=r"`.*/gone` cannot be read: no such file"):
        files.read(str(tmp_path / "gone"), 0, target(4096), 1)
    write(tmp_path / "short", 5000)
    with pytest.raises(TightfitError, match=r"`.*/short` ends at byte 5000; its weights go on to byte 5001 or") as caught:
        files.read(str(tmp_path / "short"), 4096, target(4096), 905)
    assert "cut short" in caught.value.hint
    assert files.read(str(tmp_path / "short"), 4096, target(4096), 904) == 904
    with pytest.raises(TightfitError, match=r"ends at byte 5000; its weights go on to byte 12289"):
        files.read(str(tmp_path / "short"), 12288, target(4096), 1)

    def broken(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(direct.os, "preadv", broken)
    with pytest.raises(TightfitError, match=r"`.*/short` cannot be read: input/output error"):
        files.read(str(tmp_path / "short"), 0, target(4096), 1)


def test_close_gives_descriptors_back(tmp_path):
    before = set(os.listdir("/proc/self/fd"))
    opened = DirectFiles()
    for name in "fgh":
        write(tmp_path / name, 4096)
        opened.read(str(tmp_path / name), 0, target(4096), 4096)
    assert len(set(os.listdir("/proc/self/fd")) - before) == 3
    opened.close()
    opened.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_pieces_cover_segments_and_say_what_is_needed():
    views = (
        TensorView("a", torch.uint8, (6000,), 100),
        TensorView("b", torch.uint8, (50,), 6100),
        TensorView("c", torch.uint8, (10,), 16_000),
    )
    image = BlockImage(views, (Segment("f", 4096, 8192, 0), Segment("g", 0, 12288, 8192)), 20_480)
    cut = list(pieces(image, packed(image), 4096))
    assert [(piece.file, piece.file_offset, piece.slot_offset, piece.length) for piece in cut] == [
        ("f", 4096, 0, 4096),
        ("f", 8192, 4096, 4096),
        ("g", 0, 8192, 4096),
        ("g", 4096, 12288, 4096),
        ("g", 8192, 16384, 4096),
    ]
    assert [piece.moves for piece in cut] == [
        ((100, 0, 3996),),
        ((0, 3996, 2004), (2004, 6016, 50)),
        (),
        ((3712, 6080, 10),),
        (),
    ]
    assert [piece.needed_bytes for piece in cut] == [4096, 2054, 0, 3722, 0]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_carry_every_byte_of_random_layouts(seed):
    """Reference: one tensor after the other, by its place in the file. Tensors may overlap (tied ones, parts of a fused one)."""
    draw = random.Random(seed)
    source = bytearray(draw.randbytes(40_960))
    views = []
    for n in range(draw.randint(1, 12)):
        start = draw.randrange(40_000)
        views.append(TensorView(str(n), torch.uint8, (draw.randint(0, min(9000, 40_960 - start)),), start))
    image = BlockImage(tuple(views), (Segment("f", 0, 24_576, 0), Segment("f", 24_576, 16_384, 24_576)), 40_960)
    layout = packed(image)
    slot = bytearray(layout.slot_bytes)
    for piece in pieces(image, layout, draw.choice([4096, 8192, 65_536])):
        for start, to, nbytes in piece.moves:
            assert start + nbytes <= piece.length
            slot[to : to + nbytes] = source[piece.slot_offset + start : piece.slot_offset + start + nbytes]
    for view, place in zip(views, layout.tensors, strict=True):
        assert slot[place.offset : place.offset + view.nbytes] == source[view.offset : view.offset + view.nbytes]


def test_pieces_of_an_aligned_image_stay_in_place():
    image = image_of(torch.nn.Linear(100, 100).requires_grad_(False))
    image = BlockImage(image.tensors, (Segment("f", 0, image.slot_bytes, 0),), image.slot_bytes)
    assert all(piece.slot_offset + start == to for piece in pieces(image, image, 8192) for start, to, _ in piece.moves)
    assert next(pieces(image, image, 1 << 20)) == Piece("f", 0, 40_960, 0, ((0, 0, 40_000), (40_000, 40_000, 400)))


def test_readers_do_things_in_order_and_pass_faults_on():
    readers, seen = Readers(1), []
    asked = [readers.ask(seen.append, n) for n in range(50)]
    fault = readers.ask(int, "x")
    with pytest.raises(ValueError, match="invalid literal"):
        fault.result(10)
    assert seen == list(range(50)) and all(future.done() for future in asked)
    readers.close()


def test_readers_stop_promptly_and_give_up_what_has_not_begun():
    readers, begun, go = Readers(2), threading.Semaphore(0), threading.Event()

    def slow():
        begun.release()
        go.wait(10)

    asked = [readers.ask(slow) for _ in range(100)]
    assert begun.acquire(timeout=10) and begun.acquire(timeout=10)
    threading.Timer(0.05, go.set).start()
    readers.close()
    assert [future.cancelled() for future in asked] == [False] * 2 + [True] * 98
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tightfit")]
    readers.close()


def test_idle_readers_keep_nothing_alive():
    class Thing:
        pass

    readers, thing = Readers(1), Thing()
    gone = weakref.ref(thing)
    readers.ask(id, thing).result(10)
    del thing
    for _ in range(100):
        gc.collect()
        if gone() is None:
            break
        time.sleep(0.01)
    assert gone() is None
    readers.close()


def test_a_busy_reader_does_not_hold_python_s_exit():
    program = (
        "import time; from tightfit.runtime.direct import Readers; r = Readers(2); [r.ask(time.sleep, 60) for _ in range(9)]; print('end')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=50,
        env=os.environ | {"PYTHONPATH": str(Path(direct.__file__).parents[2])},
    )
    assert ended.returncode == 0 and ended.stdout == "end\n"
