"""Links: copies and computation on two CUDA streams never meet in a slot.

There is no GPU where these tests run. What can go wrong is an order, not a kernel, so a fake device suffices: its streams are
rows of deeds that a dice lets run, bound by nothing but each row's order and the events, as CUDA promises and no more. Slots are
CPU tensors; a copy inside `torch.cuda.stream` joins that stream's row instead of running.
"""

import random
import threading
from collections import deque
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from tightfit.formats.image import TensorRecord, copy_into, image_in_files, image_of
from tightfit.runtime import stream
from tightfit.runtime.link import CpuLink, CudaLink, pinned_empty
from tightfit.runtime.stream import Stream
from tightfit.terms.errors import TightfitError


class Device:
    """Rows of deeds and the dice."""

    def __init__(self, seed: int) -> None:
        self.dice, self.lock, self.rows, self.ticks = random.Random(seed), threading.RLock(), [], 0

    def advance(self, row=None) -> bool:
        """Let one deed run that may; false when nothing may."""
        with self.lock:
            ready = [row for row in self.rows if row.deeds and row.deeds[0][0]()]
            if ready:
                self.ticks += 1
                self.dice.choice(ready).deeds.popleft()[1]()
            return bool(ready)


class Row:
    """One CUDA stream."""

    def __init__(self, device: Device) -> None:
        self.device, self.deeds = device, deque()
        device.rows.append(self)

    def put(self, deed, when=lambda: True) -> None:
        with self.device.lock:
            self.deeds.append((when, deed))

    def record_event(self, event=None):
        event = event or Event(self.device)
        self.put(event.happen)
        return event

    def wait_event(self, event) -> None:
        self.put(lambda: None, when=event.query)

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Event:
    """One CUDA event."""

    def __init__(self, device: Device) -> None:
        self.device, self.tick = device, None

    def happen(self) -> None:
        self.tick = self.device.ticks

    def query(self) -> bool:
        return self.tick is not None

    def synchronize(self) -> None:
        while True:
            with self.device.lock:  # a reader may let the last deed run between question and dice
                if self.query():
                    return
                assert self.device.advance(), "everybody waits for everybody"

    def elapsed_time(self, other) -> float:
        return float(other.tick - self.tick)  # a tick is a millisecond


@pytest.fixture(params=range(12))
def device(request, monkeypatch):
    fake = Device(request.param)
    computing = Row(fake)

    class Queued(TorchFunctionMode):
        def __init__(self, row: Row) -> None:
            super().__init__()
            self.row = row

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is not torch.Tensor.copy_:
                return func(*args, **(kwargs or {}))
            assert kwargs == {"non_blocking": True}
            return self.row.put(lambda: args[0].copy_(args[1]))

    @contextmanager
    def on(row):
        with Queued(row):
            yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: Row(fake))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(fake))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: computing)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(stream, "CpuLink", lambda: CudaLink(torch.device("cuda")))
    fake.computing = computing
    return fake


def make_blocks(count: int) -> dict[int, nn.Module]:
    blocks = {n: nn.Linear(100, 3).requires_grad_(False) for n in range(count)}
    for n, block in blocks.items():
        block.weight.data.fill_(n)
        block.bias.data.fill_(-n)
    return blocks


def from_ram(blocks, _folder):
    images = {n: image_of(block) for n, block in blocks.items()}
    sources = {n: torch.empty(image.slot_bytes, dtype=torch.uint8) for n, image in images.items()}
    for n, block in blocks.items():
        copy_into(block, images[n], sources[n])
    return images, sources


def from_disk(blocks, folder):
    images = {}
    for n, block in blocks.items():
        path = folder / f"{n}.safetensors"
        save_file({name: tensor.detach() for name, tensor in block.named_parameters()}, path)
        data, rows = path.read_bytes(), {}
        for name, tensor in block.named_parameters():
            raw = tensor.detach().numpy().tobytes()
            rows[name] = TensorRecord(str(path), data.rindex(raw), len(raw), tensor.dtype, tuple(tensor.shape))
        images[n] = image_in_files(rows)
    return images, {}


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("home", [from_ram, from_disk])
def test_every_kernel_finds_its_own_block(device, tmp_path, monkeypatch, home, slots):
    blocks, seen = make_blocks(5), []
    images, sources = home(blocks, tmp_path)
    if home is from_disk:  # as on a GPU, where no file is read straight into a slot
        monkeypatch.setattr(stream.BlockImage, "is_aligned", False)
    there_and_back = [0, 1, 2, 3, 4, 3, 2, 1, 0]
    order = there_and_back * 2 + [device.dice.randrange(5) for _ in range(30)]
    with Stream(blocks, images, slots, "cpu", sources) as ring:
        assert len(ring.memory()) == slots + (Stream.READERS if home is from_disk else 0)
        for n in order:
            ring.acquire(n)
            weight, bias = blocks[n].weight.data, blocks[n].bias.data
            for _ in range(3):  # three kernels that read the weights when the device comes to them
                device.computing.put(
                    lambda n=n, weight=weight, bias=bias: seen.append((n, weight.unique().tolist(), bias.unique().tolist()))
                )
            for _ in range(device.dice.randrange(12)):
                device.advance()
        while device.advance():
            pass
        assert ring.traffic().seconds_waited > 0
    assert seen == [(n, [float(n)], [float(-n)]) for n in order for _ in range(3)]


def test_waits_are_timed_and_taken_up(device):
    link = CudaLink(torch.device("cuda"))
    target, source = torch.zeros(8, dtype=torch.uint8), torch.ones(8, dtype=torch.uint8)
    arrived = link.copy([(target, source)], link.mark())
    link.wait(arrived)
    assert target.sum() == 0 and link.seconds_waited == 0.0
    while device.advance():
        pass
    assert target.sum() == 8 and link.seconds_waited > 0
    before, queued = link.seconds_waited, len(device.computing.deeds)
    link.wait(arrived)  # it came long ago
    assert link.seconds_waited == before and len(device.computing.deeds) == queued


def test_close_waits_for_the_last_copy(device):
    link = CudaLink(torch.device("cuda"))
    target, source = torch.zeros(8, dtype=torch.uint8), torch.ones(8, dtype=torch.uint8)
    link.copy([(target, source)], link.mark())
    link.close()
    assert target.sum() == 8


def test_cpu_copies_are_done_when_they_return():
    link = CpuLink()
    target, source = torch.zeros(8, dtype=torch.uint8), torch.arange(8, dtype=torch.uint8)
    assert link.copy([(target[4:], source[:4]), (target[:2], source[6:])], link.mark()) is None
    assert target.tolist() == [6, 7, 0, 0, 0, 1, 2, 3]


class Driver:
    """What `torch.cuda.cudart` gives, as far as pinning asks it."""

    def __init__(self, fault: int = 0) -> None:
        self.fault, self.held = fault, {}

    def cudaHostRegister(self, address: int, nbytes: int, _flags: int) -> int:
        self.held[address] = nbytes
        return self.fault

    def cudaHostUnregister(self, address: int) -> int:
        del self.held[address]
        return 0


def test_pinned_memory_is_as_large_as_asked_and_given_back(monkeypatch):
    """A power of two more would break the budget of RAM. A driver of our own, since there may be no card."""
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    with pinned_empty(5000) as flat:
        assert (flat.numel(), flat.dtype) == (5000, torch.uint8)
        assert driver.held == {flat.data_ptr(): 5000}
    assert driver.held == {}
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Driver(fault=2))
    with pytest.raises(TightfitError, match="does not pin 5000 bytes") as caught:
        pinned_empty(5000).__enter__()
    assert "ulimit" in caught.value.hint
