"""Spill: what is written can be read back, lies in the spill folder, and is gone in the end."""

import os
from pathlib import Path

import torch
from torch import nn

from tightfit.formats.image import image_of
from tightfit.runtime.spill import Spill, folder_fault


def test_a_block_is_written_into_a_nameless_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TIGHTFIT_SPILL", str(tmp_path))
    block = nn.Linear(8, 8).requires_grad_(False)
    with Spill() as held:
        written = held.write(block, image_of(block))
        (segment,) = written.segments
        assert os.readlink(segment.file).startswith(str(tmp_path / "tightfit-"))
        data = Path(segment.file).read_bytes()
    place = next(view.offset for view in written.tensors if view.name == "weight")
    assert data[place : place + 256] == block.weight.view(torch.uint8).numpy().tobytes()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line():
    error = folder_fault(Path("/there"), OSError(28, "No space left on device"))
    assert str(error) == "`/there` cannot be written: no space left on device"
    assert "TIGHTFIT_SPILL" in error.hint
