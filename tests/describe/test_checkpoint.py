"""Checkpoint: headers of real safetensors files read as safetensors itself reads them, and every way in which a file can be wrong."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tightfit.describe.checkpoint import read_checkpoint, read_header
from tightfit.runtime.weights import read_record
from tightfit.terms.errors import TightfitError

TENSORS = {
    "a.weight": torch.randn(3, 5),
    "a.bias": torch.randn(3).to(torch.bfloat16),
    "half": torch.randn(2, 2, 2).to(torch.float16),
    "whole": torch.arange(7),
    "byte": torch.arange(9, dtype=torch.uint8),
    "truth": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "nothing": torch.empty(0, 4),
}


@pytest.fixture
def folder(tmp_path):
    """Two shards and their index, as `save_pretrained` names them."""
    names = list(TENSORS)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: TENSORS[name] for name in part}, tmp_path / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def test_records_point_at_what_safetensors_reads(folder):
    records = read_checkpoint(folder)
    assert set(records) == set(TENSORS)
    for name, record in records.items():
        with safe_open(record.file, "pt") as file:
            expected = file.get_tensor(name)
        assert (record.dtype, record.shape) == (expected.dtype, tuple(expected.shape))
        assert torch.equal(read_record(record), expected)


def test_a_single_file_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert all(torch.equal(read_record(record), TENSORS[name]) for name, record in read_checkpoint(tmp_path).items())


def fault(folder) -> TightfitError:
    with pytest.raises(TightfitError) as caught:
        read_checkpoint(folder)
    return caught.value


def test_a_missing_shard_is_named(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    error = fault(folder)
    assert "model-00002-of-00002.safetensors" in str(error) and error.hint


def test_a_tensor_that_its_shard_does_not_hold_is_named(folder):
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(values))
    assert "`ghost`" in str(fault(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": null}', "\udcff"])
def test_an_index_of_junk_is_refused(folder, text):
    (folder / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "index" in str(fault(folder))


@pytest.mark.parametrize("kept", [0, 4, 8, 9, 100, -1, -20])
def test_a_truncated_file_is_refused(tmp_path, kept):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:kept])
    assert "model.safetensors" in str(fault(tmp_path))


def header(tmp_path, entry, data=b"\0" * 24):
    """A file whose header is `entry` (bytes, or a value for JSON)."""
    head = entry if isinstance(entry, bytes) else json.dumps(entry).encode()
    (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    return tmp_path


GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def test_the_good_header_is_good(tmp_path):
    (record,) = read_checkpoint(header(tmp_path, {"x": GOOD})).values()
    assert torch.equal(read_record(record), torch.zeros(2, 3))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F13"},
        {"dtype": None},
        {"shape": [2, 4]},
        {"shape": [-2, -3]},
        {"shape": "23"},
        {"shape": None},
        {"data_offsets": [0, 28]},
        {"data_offsets": [4, 28]},
        {"data_offsets": [-24, 0]},
        {"data_offsets": [24, 0]},
        {"data_offsets": [0]},
        {"data_offsets": None},
        {"data_offsets": ["a", "b"]},
    ],
)
def test_a_wrong_entry_is_refused(tmp_path, change):
    assert "model.safetensors" in str(fault(header(tmp_path, {"x": GOOD | change})))


@pytest.mark.parametrize("entry", [b"\xff\xfe", b"[]", b"5", b'"x"', {"x": 5}, {"x": {}}, {"x": {"dtype": "F32"}}, {"x": None}])
def test_a_header_of_junk_is_refused(tmp_path, entry):
    assert "model.safetensors" in str(fault(header(tmp_path, entry)))


def test_an_absurd_header_length_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    assert "not a safetensors file" in str(fault(tmp_path))


def test_a_folder_in_the_files_place_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert "model.safetensors" in str(fault(tmp_path))


def test_no_weights_at_all_says_what_was_expected(tmp_path):
    assert "model.safetensors" in fault(tmp_path).hint
    (tmp_path / "pytorch_model.bin").touch()
    assert "pytorch_model.bin" in fault(tmp_path).hint


def test_only_headers_are_read(tmp_path):
    """A sparse file of 3 GiB with one tensor takes no time and no memory."""
    head = json.dumps({"x": {"dtype": "F32", "shape": [3 << 28], "data_offsets": [0, 3 << 30]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + (3 << 30))
    assert read_header(tmp_path / "model.safetensors")["x"].nbytes == 3 << 30
