"""Streams: streamed = resident bit for bit, forward and backward; the order of reads; wrong guesses, faults, and a clean end.

Blocks are small Llama-like ones written here; one test uses layers 4096 wide, where kernels take other paths.
"""

import gc
import logging
import os
import random
import sys
import threading
import time
import weakref
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

from tightfit.formats import image
from tightfit.formats.image import TensorRecord, copy_into, image_in_files, image_of, write_image
from tightfit.runtime import direct, stream
from tightfit.runtime.stream import Stream, Traffic, Visits
from tightfit.terms.errors import TightfitError


class Block(nn.Module):
    """Pre-norm attention and gated MLP with frozen weights, a rotation buffer that no file holds, and a trainable adapter."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
        shapes |= {"gate": (3 * width, width), "up": (3 * width, width), "down": (width, 3 * width)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape).mul_(shape[1] ** -0.5).to(dtype), requires_grad=False))
        self.norm1 = nn.Parameter(torch.rand(width).to(dtype), requires_grad=False)
        self.norm2 = nn.Parameter(torch.rand(width).to(dtype), requires_grad=False)
        self.register_buffer("angle", torch.randn(16).to(dtype), persistent=False)
        self.adapter_in = nn.Parameter(torch.randn(4, width).mul_(0.1).to(dtype))
        self.adapter_out = nn.Parameter(torch.randn(width, 4).mul_(0.1).to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [part.unflatten(-1, (-1, 16)).transpose(1, 2) for part in (linear(self.normed(x), w) for w in (self.q, self.k, self.v))]
        mixed = scaled_dot_product_attention(heads[0] * self.angle, heads[1] * self.angle, heads[2], is_causal=True)
        x = x + linear(mixed.transpose(1, 2).flatten(2), self.o) + linear(linear(x, self.adapter_in), self.adapter_out)
        y = rms_norm(x, self.norm2.shape, self.norm2)
        return x + linear(silu(linear(y, self.gate)) * linear(y, self.up), self.down)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.norm1.shape, self.norm1)


def make_blocks(count: int, width: int = 64, dtype: torch.dtype = torch.float32) -> list[Block]:
    torch.manual_seed(7)
    return [Block(width, dtype) for _ in range(count)]


def in_model_files(blocks, folder):
    """Images straight in two safetensors files; the rotation buffers are not there, so they stay with their blocks."""
    saved = [
        {f"{n}.{name}": tensor for n, block in enumerate(blocks) if n % 2 == part for name, tensor in frozen(block)} for part in (0, 1)
    ]
    records = [{} for _ in blocks]
    for part, tensors in enumerate(saved):
        path = folder / f"model-{part}.safetensors"
        save_file(tensors, path, metadata={"pad": "x" * 11 * part})
        data = path.read_bytes()
        for key, tensor in tensors.items():
            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            number, name = key.split(".")
            records[int(number)][name] = TensorRecord(str(path), data.index(raw), len(raw), tensor.dtype, tuple(tensor.shape))
    return {n: image_in_files(rows) for n, rows in enumerate(records)}, {}


def frozen(block):
    return [(name, tensor.detach()) for name, tensor in block.named_parameters() if not tensor.requires_grad]


def in_spill_file(blocks, folder):
    images, end = {}, 0
    with open(folder / "spill", "w+b") as file:
        for n, block in enumerate(blocks):
            images[n] = write_image(block, image_of(block), file, end)
            end += images[n].segments[0].length
    return images, {}


def in_ram(blocks, _folder):
    images = {n: image_of(block) for n, block in enumerate(blocks)}
    sources = {n: torch.empty(image.slot_bytes, dtype=torch.uint8) for n, image in images.items()}
    for n, block in enumerate(blocks):
        copy_into(block, images[n], sources[n])
    return images, sources


HOMES = {"model files": in_model_files, "spill file": in_spill_file, "ram": in_ram}


@contextmanager
def streamed(blocks, folder, slots=2, home="spill file", only=None):
    """The blocks (or `only` some) streamed from where they were put, as a list of callables."""
    images, sources = HOMES[home](blocks, folder)
    chosen = only if only is not None else range(len(blocks))
    with Stream({n: blocks[n] for n in chosen}, images, slots, "cpu", {n: sources[n] for n in chosen if n in sources}) as ring:

        def run(n, x):
            if n in chosen:
                ring.acquire(n)
            return blocks[n](x)

        yield ring, run


def step(blocks, run, x, ring=None):
    """Forward and backward with every block recomputed: output, and gradients of the input and of all adapters."""
    hidden = x = x.clone().requires_grad_(True)
    for n in range(len(blocks)):
        hidden = checkpoint(run, n, hidden, use_reentrant=False)
    hidden.float().square().sum().backward()
    adapters = [parameter for block in blocks for parameter in block.parameters() if parameter.requires_grad]
    gradients = [x.grad, *(parameter.grad for parameter in adapters)]
    for parameter in adapters:
        parameter.grad = None
    return [hidden.detach(), *gradients]


def all_equal(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_is_resident_bit_for_bit(tmp_path, home, slots, dtype):
    blocks = make_blocks(5, dtype=dtype)
    inputs = [torch.randn(2, tokens, 64).to(dtype) for tokens in (9, 1)]
    resident = lambda n, x: blocks[n](x)  # noqa: E731
    with torch.no_grad():
        forward = [run_all(resident, 5, x) for x in inputs]
    tuned = step(blocks, resident, inputs[0])
    with streamed(blocks, tmp_path, slots, home) as (_, run):
        with torch.no_grad():
            assert all_equal([run_all(run, 5, x) for x in inputs for _ in range(2)], [y for y in forward for _ in range(2)])
        with torch.inference_mode():
            assert torch.equal(run_all(run, 5, inputs[1]), forward[1])
        for _ in range(3):
            assert all_equal(step(blocks, run, inputs[0]), tuned)


def run_all(run, count, x):
    for n in range(count):
        x = run(n, x)
    return x


def test_only_some_blocks_streamed(tmp_path):
    blocks, x = make_blocks(6), torch.randn(1, 5, 64)
    wanted = step(blocks, lambda n, y: blocks[n](y), x)
    with streamed(blocks, tmp_path, only=[1, 4, 5]) as (_, run):
        assert all_equal(step(blocks, run, x), wanted) and all_equal(step(blocks, run, x), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("home", ["model files", "spill file"])
def test_bit_for_bit_at_real_width(tmp_path, dtype, home):
    """One token and several: a float32 product with a single row is what MKL rounds by the weight's address."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4096, 4096, dtype=dtype).uniform_(-0.03, 0.03), requires_grad=False)
            self.bias = nn.Parameter(torch.empty(4096, dtype=dtype).uniform_(-1, 1), requires_grad=False)

        def forward(self, x):
            return x + silu(linear(x, self.weight, self.bias))

    torch.manual_seed(3)
    blocks = [Wide() for _ in range(3)]
    inputs = [torch.randn(tokens, 4096).to(dtype).requires_grad_(True) for tokens in (1, 5)]
    resident = lambda n, x: blocks[n](x)  # noqa: E731
    wanted = [wide_step(resident, x) for x in inputs]
    with streamed(blocks, tmp_path, 2, home) as (_, run):
        assert all(all_equal(wide_step(run, x), want) for x, want in zip(inputs, wanted, strict=True))


def wide_step(run, x):
    y = x
    for n in range(3):
        y = checkpoint(run, n, y, use_reentrant=False)
    return [y.detach(), *torch.autograd.grad(y.float().sum(), x)]


def test_visits_go_round_in_ascending_order():
    visits = Visits([3, 0, 8])
    assert visits.ahead(2) == [0, 3]
    seen = []
    for position in (0, 3, 8, 0, 3, 8):
        visits.visit(position)
        seen.append(visits.ahead(2))
    assert seen == [[3, 8], [8, 0], [0, 3], [3, 8], [8, 0], [0, 3]]


def test_visits_foresee_backward_passes():
    visits, missed = Visits(range(4)), []
    for turn in range(3):
        for position in (0, 1, 2, 3, 2, 1, 0, None):
            if position is None:
                continue
            if position == 0 and turn and visits.ahead(1) == [1]:
                continue  # the block at the turn is not acquired again
            if visits.ahead(1) != [position]:
                missed.append((turn, position))
            visits.visit(position)
    assert missed == [(0, 2)]


def test_visits_follow_the_first_backward_pass_down_and_decoders_back():
    visits = Visits(range(6))
    for position in (0, 1, 2, 3, 4, 5, 4):
        visits.visit(position)
    assert visits.ahead(3) == [3, 2, 1]  # never seen, but the direction is
    decoding = Visits(range(6))
    for position in (0, 1, 2, 3, 4, 5, 3):
        decoding.visit(position)
    assert decoding.ahead(2) == [4, 5]
    for position in (4, 5):
        decoding.visit(position)
    assert decoding.ahead(4) == [3, 4, 5, 3]


class Source:
    """Blocks of one tensor in RAM, and a record of which were moved: enough for the schedule, which knows only positions."""

    def __init__(self, count: int, slots: int, device: str = "cpu") -> None:
        self.blocks = {n: nn.Linear(4, 1, bias=False).requires_grad_(False) for n in range(count)}
        for n, block in self.blocks.items():
            block.weight.data.fill_(n)
        images = {n: image_of(block) for n, block in self.blocks.items()}
        sources = {n: torch.empty(image.slot_bytes, dtype=torch.uint8) for n, image in images.items()}
        for n, block in self.blocks.items():
            copy_into(block, images[n], sources[n])
        self.ring = Stream(self.blocks, images, slots, device, sources)

    def visit(self, *positions: int) -> int:
        """Acquire these, look at their weights, and return how many blocks were fetched on the way."""
        before = self.ring.traffic().reads
        for position in positions:
            self.ring.acquire(position)
            assert self.blocks[position].weight.tolist() == [[position] * 4]
            others = [block for n, block in self.blocks.items() if n != position]
            assert all(block.weight.shape == (0,) for block in others)
        return self.ring.traffic().reads - before


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_rounds_fetch_every_block_once(slots):
    source = Source(6, slots)
    with source.ring:
        assert source.ring.traffic().reads == slots  # before the first is asked for
        source.visit(*range(6))
        assert [source.visit(*range(6)) for _ in range(3)] == [6, 6, 6]


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_training_steps_fetch_only_what_fell_out(slots):
    """The blocks at each turn are still in their slots: there and back moves 2 · (blocks - slots)."""
    source, there_and_back = Source(6, slots), (0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0)
    with source.ring:
        source.visit(*there_and_back)
        assert [source.visit(*there_and_back) for _ in range(3)] == [2 * (6 - slots)] * 3


def test_random_orders_always_bring_the_right_block():
    for slots in (2, 3, 5):
        source, draw = Source(5, slots), random.Random(slots)
        with source.ring:
            source.visit(*(draw.randrange(5) for _ in range(300)))


def test_as_many_slots_as_blocks_never_fetch_again():
    source = Source(3, 8)
    with source.ring:
        assert source.visit(*range(3), *range(3), 2, 0, 1) == 0 and len(source.ring.memory()) == 3


def test_slots_keep_their_number():
    source = Source(2, 2)
    source.ring.close()
    with pytest.raises(TightfitError, match="two slots"):
        Source(2, 1)


def test_the_next_block_comes_while_this_one_runs(tmp_path, monkeypatch):
    """No clock: the read of block 2 must begin though nobody asks for it, and asking for block 1 must not wait for it."""
    blocks = make_blocks(3)
    begun, may_end, real = {n: threading.Event() for n in range(3)}, threading.Event(), direct.DirectFiles.read

    def reading(self, file, offset, target, needed):
        n = int(file[-1])
        begun[n].set()
        if n == 2:
            assert may_end.wait(20)
        return real(self, file, offset, target, needed)

    monkeypatch.setattr(direct.DirectFiles, "read", reading)
    images = {}
    for n, block in enumerate(blocks):
        with open(tmp_path / str(n), "w+b") as file:
            images[n] = write_image(block, image_of(block), file, 0)
    with Stream(dict(enumerate(blocks)), images, 2, "cpu") as ring:
        ring.acquire(0)
        assert begun[1].wait(20) and not begun[2].is_set()  # block 0 is still in use, so there is no slot for 2
        ring.acquire(1)
        assert begun[2].wait(20)
        assert blocks[1].q.shape == (64, 64)
        threading.Timer(0.1, may_end.set).start()
        ring.acquire(2)
        assert ring.traffic().seconds_waited > 0.05


def test_wrong_guesses_are_dropped_before_the_right_block_is_read(tmp_path, monkeypatch):
    """Block 1 is foreseen; while its first pieces are held up, block 3 is asked for: the rest of 1 must not be read before it."""
    blocks = make_blocks(4)
    monkeypatch.setattr(Stream, "PIECE_BYTES", 4096)
    images, _ = in_spill_file(blocks, tmp_path)
    first = images[1].segments[0].file_offset
    order, hold, go, real = [], threading.Event(), threading.Event(), direct.DirectFiles.read

    def reading(self, file, offset, target, needed):
        if first <= offset < first + images[1].slot_bytes:
            hold.set()
            assert go.wait(20)
        order.append(offset // images[1].slot_bytes)
        return real(self, file, offset, target, needed)

    monkeypatch.setattr(direct.DirectFiles, "read", reading)
    weights = {name: tensor.clone() for name, tensor in frozen(blocks[3])}
    with Stream(dict(enumerate(blocks)), images, 2, "cpu") as ring:
        ring.acquire(0)
        assert hold.wait(20)
        threading.Timer(0.05, go.set).start()
        ring.acquire(3)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in frozen(blocks[3]))
        assert order.count(1) <= Stream.READERS < images[1].slot_bytes // 4096
        ring.acquire(1)
        moved = ring.traffic().bytes_moved
        ring.close()
        assert moved <= ring.traffic().bytes_moved == len(order) * 4096


def test_traffic_counts_bytes_and_blocks(tmp_path):
    blocks = make_blocks(3)
    with streamed(blocks, tmp_path) as (ring, _):
        for n in (0, 1, 2, 0):
            ring.acquire(n)
    size = image_of(blocks[0].__class__(64, torch.float32)).slot_bytes
    traffic = ring.traffic()
    assert traffic == Traffic(traffic.bytes_moved, 5, traffic.seconds_waited)
    assert 4 * size <= traffic.bytes_moved <= 5 * size and traffic.seconds_waited > 0


def test_memory_is_slots_and_buffers(tmp_path, monkeypatch):
    blocks = make_blocks(3)
    monkeypatch.setattr(Stream, "PIECE_BYTES", 8192)
    size = image_of(blocks[0]).slot_bytes
    with streamed(blocks, tmp_path) as (ring, _):
        assert [flat.numel() for flat in ring.memory()] == [size, size]
    blocks = make_blocks(3)
    with streamed(blocks, tmp_path, home="model files") as (ring, _):
        assert [flat.numel() for flat in ring.memory()] == [size, size, 8192, 8192]
        storages = {tensor.untyped_storage().data_ptr() for _, tensor in frozen(blocks[1])}
        ring.acquire(1)
        storages = {tensor.untyped_storage().data_ptr() for _, tensor in frozen(blocks[1])}
        assert len(storages) == 1 and storages <= {flat.untyped_storage().data_ptr() for flat in ring.memory()}
    assert ring.memory() == []


@pytest.mark.parametrize(
    ("damage", "line"),
    [(os.remove, "cannot be read: no such file"), (lambda path: os.truncate(path, 200_000), "ends at byte 200000; its weights go on to")],
)
def test_missing_and_truncated_files_are_told_when_the_block_is_wanted(tmp_path, damage, line):
    blocks, same = make_blocks(4), make_blocks(4)
    images, _ = in_model_files(blocks, tmp_path)
    damage(tmp_path / "model-1.safetensors")  # blocks 1 and 3
    with Stream(dict(enumerate(blocks)), images, 2, "cpu") as ring:
        ring.acquire(0)  # block 1, foreseen and broken, does not disturb block 0
        assert all_equal([blocks[0].q, blocks[0].norm2], [same[0].q, same[0].norm2])
        for position in (1, 1, 3):
            with pytest.raises(TightfitError, match=line) as caught:
                ring.acquire(position)
            assert "model-1.safetensors" in str(caught.value)
        ring.acquire(2)
        assert all_equal([blocks[2].q, blocks[2].norm2], [same[2].q, same[2].norm2])


def test_a_fault_that_passes_is_not_remembered(tmp_path, monkeypatch):
    blocks, same, real, broken = make_blocks(3), make_blocks(3), os.preadv, threading.Event()

    def reading(*what):
        if broken.is_set():
            raise OSError(5, "broken")
        return real(*what)

    with streamed(blocks, tmp_path) as (ring, _):
        ring.acquire(0)
        monkeypatch.setattr(direct.os, "preadv", reading)
        broken.set()
        with pytest.raises(TightfitError, match="input/output error"):
            ring.acquire(2)
        broken.clear()
        ring.acquire(2)
        assert all_equal([blocks[2].q, blocks[2].norm2], [same[2].q, same[2].norm2])


def test_direct_reads_refused_gives_the_same(tmp_path, monkeypatch, caplog):
    blocks, x, real = make_blocks(3), torch.randn(1, 4, 64), os.open
    wanted = step(blocks, lambda n, y: blocks[n](y), x)

    def opening(file, how, *mode):
        if how & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(file, how, *mode)

    monkeypatch.setattr(direct.os, "open", opening)
    with caplog.at_level(logging.WARNING), streamed(blocks, tmp_path, home="model files") as (_, run):
        assert all_equal(step(blocks, run, x), wanted)
    assert len(caplog.records) == 1


def test_backward_without_recomputation_is_refused_not_wrong(tmp_path):
    blocks = make_blocks(4)
    with streamed(blocks, tmp_path) as (_, run):
        result = run_all(run, 4, torch.randn(1, 4, 64, requires_grad=True)).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()


def threads_and_descriptors():
    return {thread.name for thread in threading.enumerate()}, set(os.listdir("/proc/self/fd"))


def test_nothing_is_left_after_close(tmp_path):
    before, blocks = threads_and_descriptors(), make_blocks(3)
    with streamed(blocks, tmp_path) as (ring, run):
        run(0, torch.randn(1, 2, 64))
        assert threads_and_descriptors() != before
        ring.close()
        assert threads_and_descriptors() == before
        ring.close()
    assert all(tensor.numel() == 0 for block in blocks for _, tensor in frozen(block))
    with pytest.raises(TightfitError, match="the stream is closed"):
        ring.acquire(0)


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_a_fault_in_the_run(tmp_path, fault):
    before, blocks = threads_and_descriptors(), make_blocks(3)
    with pytest.raises(fault), streamed(blocks, tmp_path) as (_, run):
        run(0, torch.randn(1, 2, 64))
        raise fault
    assert threads_and_descriptors() == before


def test_interrupted_wait_ends_promptly(tmp_path, monkeypatch):
    """Ctrl-C while a slow disk is read: the wait ends at once, and closing takes no longer than the piece that is being read."""
    import _thread

    before, blocks = threads_and_descriptors(), make_blocks(3)
    monkeypatch.setattr(Stream, "PIECE_BYTES", 4096)
    real = direct.DirectFiles.read
    monkeypatch.setattr(direct.DirectFiles, "read", lambda *what: time.sleep(0.2) or real(*what))
    began = time.perf_counter()
    threading.Timer(0.3, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt), streamed(blocks, tmp_path) as (_, run):
        run(0, torch.randn(1, 2, 64))
    pieces_in_all = 2 * image_of(Block(64, torch.float32)).slot_bytes // 4096
    assert time.perf_counter() - began < 5 < pieces_in_all * 0.2 / Stream.READERS
    assert threads_and_descriptors() == before


def test_forgotten_stream_ends_by_itself(tmp_path):
    before, blocks = threads_and_descriptors(), make_blocks(3)
    images, _ = in_spill_file(blocks, tmp_path)
    ring = Stream(dict(enumerate(blocks)), images, 2, "cpu")
    ring.acquire(1)
    gone, blocks[0].ring = weakref.ref(ring), ring  # a circle, as a model's socket makes one
    del ring, blocks
    gc.collect()
    assert gone() is None and threads_and_descriptors() == before


def small_blocks():
    torch.manual_seed(5)
    return [nn.Linear(64, 64).requires_grad_(False) for _ in range(4)]


def interrupted_at(number, work):
    """Do `work`, but raise KeyboardInterrupt before the `number`-th line that the main thread comes to in the stream's own files."""
    files, seen = {stream.__file__, direct.__file__, image.__file__}, 0

    def trace(frame, event, _argument):
        nonlocal seen
        if frame.f_code.co_filename not in files:
            return None
        seen += event == "line"
        if event == "line" and seen == number:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("home", HOMES)
def test_an_interrupt_at_any_line_leaves_a_stream_that_goes_on(tmp_path, monkeypatch, home):
    """As in a notebook: Ctrl-C, then the same model again. No block is ever taken for another, or run without its weights."""
    monkeypatch.setattr(Stream, "PIECE_BYTES", 16384)
    blocks, x = small_blocks()[:3], torch.randn(3, 64)
    with torch.inference_mode():
        expected, number = run_all(lambda n, y: blocks[n](y), 3, x), 0
        with streamed(blocks, tmp_path, home=home) as (_, run):
            while interrupted_at(number := number + 1, lambda: run_all(run, 3, x)):
                assert torch.equal(run_all(run, 3, x), expected), f"wrong after an interrupt at line {number}"
    assert number > 200


def test_an_interrupt_in_any_read_is_made_good(tmp_path, monkeypatch):
    monkeypatch.setattr(Stream, "PIECE_BYTES", 8192)
    blocks, x, real, countdown, told = small_blocks(), torch.randn(3, 64), direct.DirectFiles.read, [0], 0

    def reading(*what):
        countdown[0] -= 1
        if countdown[0] == 0:
            raise KeyboardInterrupt
        return real(*what)

    monkeypatch.setattr(direct.DirectFiles, "read", reading)
    with torch.inference_mode():
        expected = run_all(lambda n, y: blocks[n](y), 4, x)
        with streamed(blocks, tmp_path) as (_, run):
            for call in range(1, 13):
                countdown[0] = call
                for _ in range(2):
                    try:
                        assert torch.equal(run_all(run, 4, x), expected)
                    except KeyboardInterrupt:
                        told += 1
                assert torch.equal(run_all(run, 4, x), expected)
    assert told == 12


def test_a_piece_that_was_noted_but_never_asked_for_is_given_up(tmp_path, monkeypatch):
    """Interrupted right before the readers hear of it: nobody may wait for it, nor take its block for one that came."""
    blocks, x = small_blocks(), torch.randn(3, 64)
    expected, real = run_all(lambda n, y: blocks[n](y), 4, x), direct.Readers.fulfil

    def refusing(*_what):
        raise KeyboardInterrupt

    with streamed(blocks, tmp_path) as (_, run):
        for first in (0, 2, 3, 1):
            monkeypatch.setattr(direct.Readers, "fulfil", refusing)
            with pytest.raises(KeyboardInterrupt):
                for n in range(4):
                    run((first + n) % 4, x)
            monkeypatch.setattr(direct.Readers, "fulfil", real)
            assert torch.equal(run_all(run, 4, x), expected)
