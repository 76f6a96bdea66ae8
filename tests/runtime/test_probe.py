"""Probe: what goes wrong while it measures, and that its trial runs know nothing of an earlier probe. Rates are not tested."""

import os

import pytest

from tightfit.runtime import probe
from tightfit.terms.errors import TightfitError
from tightfit.terms.machine import machine_file
from tightfit.terms.units import MIB


def test_a_fresh_file_is_read_at_some_rate(tmp_path):
    assert probe.disk_bandwidth(tmp_path, 16 * MIB) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(TightfitError, match="nowhere` cannot be written: no such file or directory") as caught:
        probe.disk_bandwidth(tmp_path / "nowhere", MIB)
    assert "TIGHTFIT_SPILL" in caught.value.hint


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TightfitError, match="cannot be written: no space left"):
        probe.disk_bandwidth(tmp_path, 8 * MIB)
    assert list(tmp_path.iterdir()) == []


def test_a_trial_run_does_not_read_a_damaged_file_of_an_earlier_probe():
    machine_file().parent.mkdir(parents=True, exist_ok=True)
    machine_file().write_text("{")
    try:
        said = probe._child(
            ["-c", "from tightfit.terms.machine import Machine, machine_file; print(Machine.here().probed, machine_file())"]
        )
    finally:
        machine_file().unlink()
    probed, file = said.split()
    assert probed == "False" and file != str(machine_file())
    assert not os.path.exists(os.path.dirname(file))


def test_a_trial_run_that_fails_says_why():
    with pytest.raises(TightfitError, match="trial run failed: the reason") as caught:
        probe._child(["-c", "import sys; sys.exit('the reason\\nand more')"])
    assert caught.value.hint


def test_overheads_are_the_lesser_of_two_runs(monkeypatch):
    runs = iter([(900, 950, 100), (800, 700, 150)])

    def child(words):
        load, run, tensors = next(runs)
        return f'{{"process": {{"load_peak": {load}, "run_peak": {run}}}, "measured_peak_bytes": {tensors}}}'

    monkeypatch.setattr(probe, "_child", child)
    assert probe._overhead([]) == 650


def test_a_library_takes_something_even_where_both_runs_had_loaded_it():
    assert probe._library_bytes(7 * MIB) == 7 * MIB
    assert probe._library_bytes(3) > 4 * MIB
