"""Images: layouts, images that lie in files, binding, writing, and the lines for people when a disk fails."""

import errno
import gc
import json
import os
import struct
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tightfit.formats import image as images
from tightfit.formats.image import (
    BlockImage,
    Segment,
    TensorRecord,
    TensorView,
    bind,
    copy_into,
    image_in_files,
    image_of,
    packed,
    unbind,
    write_image,
)
from tightfit.terms.errors import TightfitError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8, "F64": torch.float64}


class Block(nn.Module):
    """Frozen weights, a tied one, a trainable one, a scalar, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(5, 7, bias=False, dtype=torch.bfloat16)
        self.tied = nn.Linear(5, 7, bias=False)
        self.tied.weight = self.up.weight
        self.requires_grad_(False)
        self.adapter = nn.Parameter(torch.randn(3))
        self.register_buffer("scale", torch.tensor(2.5, dtype=torch.float64))
        self.register_buffer("mask", torch.tensor([True, False, True]), persistent=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.named_parameters()) | dict(self.named_buffers())


def random_block(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block()


def records_of(path) -> dict[str, TensorRecord]:
    """Read the safetensors header by hand, from the format's description: 8 bytes of length, JSON, data."""
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    return {
        name: TensorRecord(
            str(path),
            8 + size + row["data_offsets"][0],
            row["data_offsets"][1] - row["data_offsets"][0],
            DTYPES[row["dtype"]],
            tuple(row["shape"]),
        )
        for name, row in header.items()
        if name != "__metadata__"
    }


def slot_from(image: BlockImage) -> torch.Tensor:
    """Fill a slot as the segments say, with plain file reads."""
    flat = torch.zeros(image.slot_bytes, dtype=torch.uint8)
    for segment in image.segments:
        with open(segment.file, "rb") as file:
            file.seek(segment.file_offset)
            data = file.read(segment.length)
        flat[segment.slot_offset : segment.slot_offset + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return flat


def test_layout_is_packed_aligned_and_tied_tensors_are_laid_once():
    image = image_of(random_block())
    places = {view.name: (view.offset, view.dtype, view.shape) for view in image.tensors}
    assert places == {
        "up.weight": (0, torch.float32, (7, 5)),
        "up.bias": (192, torch.float32, (7,)),
        "down.weight": (256, torch.bfloat16, (7, 5)),
        "tied.weight": (0, torch.float32, (7, 5)),
        "scale": (384, torch.float64, ()),
        "mask": (448, torch.bool, (3,)),
    }
    assert image.segments == () and image.slot_bytes == 4096 and image.is_aligned


def test_layout_on_meta_and_on_fake_tensors_is_the_same():
    with torch.device("meta"):
        on_meta = Block()
    with FakeTensorMode():
        fake = Block()
    assert image_of(on_meta) == image_of(random_block()) == image_of(fake)


def test_buffers_over_the_same_storage_but_other_places_are_not_mixed_up():
    block = nn.Module()
    row = torch.arange(10.0)
    block.register_buffer("whole", row)
    block.register_buffer("part", row[2:5])
    block.register_buffer("other_name", row)
    image = image_of(block)
    assert [view.offset for view in image.tensors] == [0, 64, 0]
    flat = torch.empty(image.slot_bytes, dtype=torch.uint8)
    copy_into(block, image, flat)
    unbind(block, image)
    bind(block, image, flat)
    assert torch.equal(block.part, torch.tensor([2.0, 3.0, 4.0])) and torch.equal(block.other_name, torch.arange(10.0))


def test_a_block_that_is_all_trainable_is_refused():
    with pytest.raises(TightfitError, match="no frozen tensor") as caught:
        image_of(nn.Linear(2, 2))
    assert "requires_grad_(False)" in caught.value.hint


def test_bound_block_has_the_slot_s_bytes_and_trainable_parameters_stay():
    block, image = random_block(), image_of(random_block())
    wanted = {name: tensor.detach().clone() for name, tensor in block.tensors().items()}
    adapter, weight = block.adapter, block.up.weight
    flat = torch.empty(image.slot_bytes, dtype=torch.uint8)
    copy_into(block, image, flat)
    unbind(block, image)
    assert all(tensor.numel() == 0 for name, tensor in block.tensors().items() if name != "adapter")
    assert block.down.weight.dtype == torch.bfloat16
    bind(block, image, flat)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in block.tensors().items())
    assert block.up.weight is weight is block.tied.weight and block.adapter is adapter and adapter.requires_grad
    assert block.up.weight.data_ptr() == flat.data_ptr()


def test_unbound_block_holds_no_memory():
    block = random_block()
    image = image_of(block)
    flat, died = torch.zeros(image.slot_bytes, dtype=torch.uint8), []
    weakref.finalize(flat.untyped_storage(), died.append, True)
    bind(block, image, flat)
    del flat
    gc.collect()
    assert died == []
    unbind(block, image)
    assert died == [True]


def test_bind_replaces_meta_tensors_and_keeps_ties():
    with torch.device("meta"):
        block = Block()
    source, image = random_block(), image_of(random_block())
    flat = torch.empty(image.slot_bytes, dtype=torch.uint8)
    copy_into(source, image, flat)
    only_one_name = BlockImage(tuple(view for view in image.tensors if view.name != "tied.weight"), (), image.slot_bytes)
    bind(block, only_one_name, flat)
    assert torch.equal(block.up.weight, source.up.weight) and torch.equal(block.scale, source.scale)
    assert block.tied.weight is block.up.weight and not block.up.weight.requires_grad
    assert "mask" not in block.state_dict()


def test_bind_under_fake_tensors_takes_the_slot_s_storage():
    with FakeTensorMode():
        block = Block()
        image = image_of(block)
        flat = torch.empty(image.slot_bytes, dtype=torch.uint8)
        bind(block, image, flat)
        storages = {tensor.untyped_storage()._cdata for name, tensor in block.tensors().items() if name != "adapter"}
        assert storages == {flat.untyped_storage()._cdata} and block.up.weight.shape == (7, 5)
        assert block.up(torch.empty(2, 5)).shape == (2, 7)
        unbind(block, image)
        assert block.up.weight.shape == (0,)


def test_tensors_bound_in_inference_mode_can_be_tuned_later():
    block = nn.Linear(4, 4).requires_grad_(False)
    image = image_of(block)
    flat = torch.zeros(image.slot_bytes, dtype=torch.uint8)
    with torch.inference_mode():
        bind(block, image, flat)
    inputs = torch.ones(2, 4, requires_grad=True)
    block(inputs).sum().backward()
    assert torch.equal(inputs.grad, torch.zeros(2, 4))


@pytest.mark.parametrize("kind", ["linear", "norm", "buffer"])
def test_backward_over_weights_given_up_is_refused_by_autograd(kind):
    block = nn.Linear(4, 4) if kind == "linear" else nn.LayerNorm(4)
    if kind == "buffer":
        block = nn.Module()
        block.register_buffer("weight", torch.randn(2, 4))
        block.forward = lambda x: x * block.weight
    block.requires_grad_(False)
    image = image_of(block)
    flat = torch.zeros(image.slot_bytes, dtype=torch.uint8)
    bind(block, image, flat)
    result = block(torch.randn(2, 4, requires_grad=True)).sum()
    unbind(block, image)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_images_do_not_touch_trainable_or_unknown_tensors():
    block = random_block()
    image = image_of(block)
    block.up.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="trainable"):
        unbind(block, image)
    with pytest.raises(ValueError, match=r"no tensor `up\.weight`"):
        unbind(nn.Linear(2, 2), image)


@pytest.mark.parametrize("note", ["", "x" * 3, "x" * 61, "x" * 5000])
def test_image_straight_in_a_real_safetensors_file(tmp_path, note):
    torch.manual_seed(1)
    tensors = {f"layers.{i}.{name}": torch.randn(shape) for i in range(3) for name, shape in (("a", (300, 7)), ("b", (33,)))}
    tensors["layers.1.c"] = torch.randn(9, 9).to(torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"note": note})
    records = {name.removeprefix("layers.1."): row for name, row in records_of(tmp_path / "model.safetensors").items() if ".1." in name}
    image = image_in_files(records)
    assert all(number % 4096 == 0 for s in image.segments for number in (s.file_offset, s.length, s.slot_offset))
    block = nn.Module()
    for name, row in records.items():
        block.register_buffer(name, torch.empty(row.shape, dtype=row.dtype))
    bind(block, image, slot_from(image))
    assert all(torch.equal(block.get_buffer(name), tensors[f"layers.1.{name}"]) for name in records)
    again = packed(image)
    assert again.is_aligned and again.segments == () and [view.name for view in again.tensors] == [view.name for view in image.tensors]


@pytest.mark.parametrize("extra", range(8))
def test_odd_headers_of_older_writers(tmp_path, extra):
    """The format lets a header have any length; then float32 data may lie at an odd address, and int8 data never does."""
    rows = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"pad": "x" * extra}}
    header = json.dumps(rows).encode()
    start = 8 + len(header)
    (tmp_path / "odd").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1.0, 2.0))
    records = records_of(tmp_path / "odd")
    image = image_in_files(records)
    assert (image is None) == (start % 4 != 0)
    assert image_in_files({"w": TensorRecord(str(tmp_path / "odd"), start, 8, torch.int8, (8,))}) is not None
    if image is not None:
        assert image.tensors == (TensorView("w", torch.float32, (2,), start),)
        assert image.segments == (Segment(str(tmp_path / "odd"), 0, 4096, 0),)


def test_near_ranges_are_merged_and_far_ones_are_not():
    def record(file: str, offset: int, count: int) -> TensorRecord:
        return TensorRecord(file, offset, count, torch.uint8, (count,))

    near = image_in_files({"a": record("f", 5000, 10), "b": record("f", 5010 + 65536, 10)})
    assert near.segments == (Segment("f", 4096, 69632, 0),)
    assert [view.offset for view in near.tensors] == [904, 5010 + 65536 - 4096]
    far = image_in_files({"b": record("f", 5011 + 65536, 4096), "a": record("f", 5000, 10), "c": record("g", 4095, 2)})
    assert far.segments == (Segment("f", 4096, 4096, 0), Segment("f", 69632, 8192, 4096), Segment("g", 0, 8192, 12288))
    assert [view.offset for view in far.tensors] == [4096 + 70547 - 69632, 904, 12288 + 4095]
    assert far.slot_bytes == 20480


def test_empty_tensors_lie_in_no_file():
    image = image_in_files({"none": TensorRecord("f", 123456, 0, torch.float32, (0, 4)), "one": TensorRecord("f", 8, 4, torch.float32, ())})
    assert image.segments == (Segment("f", 0, 4096, 0),) and image.tensors[0].offset == 0


def test_a_record_that_contradicts_its_shape_is_named():
    with pytest.raises(TightfitError, match=r"`w` in `f` takes 12 bytes; its shape \(2, 2\) needs 16"):
        image_in_files({"w": TensorRecord("f", 0, 12, torch.float32, (2, 2))})


def test_written_images_read_back_one_after_the_other(tmp_path):
    blocks = [random_block(1), random_block(2)]
    wanted = [{name: tensor.detach().clone() for name, tensor in block.tensors().items()} for block in blocks]
    written, end = [], 0
    with open(tmp_path / "spill", "w+b") as file:
        for block in blocks:
            written.append(write_image(block, image_of(block), file, end))
            end += written[-1].segments[0].length
    assert [image.segments[0].file_offset for image in written] == [0, 4096] and os.path.getsize(tmp_path / "spill") == end
    for block, image, tensors in zip(blocks, written, wanted, strict=True):
        unbind(block, image)
        bind(block, image, slot_from(image))
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in block.tensors().items())


def test_writing_needs_a_whole_page(tmp_path):
    with open(tmp_path / "spill", "w+b") as file, pytest.raises(ValueError, match="4096"):
        write_image(random_block(), image_of(random_block()), file, 100)


def test_full_disk_is_one_clear_line():
    block = random_block()
    with (
        open("/dev/full", "r+b", buffering=0) as full,
        pytest.raises(TightfitError, match="`/dev/full` cannot be written: no space") as caught,
    ):
        write_image(block, image_of(block), full, 0)
    assert "TIGHTFIT_SPILL" in caught.value.hint


@pytest.mark.parametrize(
    ("code", "line", "hint"), [(errno.EIO, "input/output error", "disk"), (errno.EACCES, "permission denied", "permissions")]
)
def test_faults_while_flushing_are_clear_too(tmp_path, monkeypatch, code, line, hint):
    def fail(_descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(images.os, "fsync", fail)
    with open(tmp_path / "spill", "w+b") as file, pytest.raises(TightfitError, match=line) as caught:
        write_image(random_block(), image_of(random_block()), file, 0)
    assert hint in caught.value.hint and str(tmp_path / "spill") in str(caught.value)
