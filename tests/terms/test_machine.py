"""Machine: the probe's file, whole, missing, damaged, unwritable; and the overhead it tells."""

import json
import os

import pytest

from tightfit.terms.errors import TightfitError
from tightfit.terms.machine import Machine, machine_file


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TIGHTFIT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_missing_file_gives_cautious_guesses(home):
    assert Machine.here() == Machine()
    assert not Machine().probed
    assert not home.exists()


def test_what_is_saved_is_read_again(home):
    machine = Machine(probed=True, device="cuda", flops=1.5e12, disk_bandwidth=3, overhead_ram=123, version="2.13")
    assert machine.save() == machine_file() == home / "machine.json"
    assert Machine.here() == machine
    assert os.listdir(home) == ["machine.json"]


def test_a_setting_of_a_newer_version_is_passed_over(home):
    Machine(probed=True, flops=5.0).save()
    machine_file().write_text(json.dumps(json.loads(machine_file().read_text()) | {"tomorrow": 1}))
    assert Machine.here() == Machine(probed=True, flops=5.0)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"null",
        b"\xff\xfe\x00",
        b'{"flops": "fast"}',
        b'{"flops": null}',
        b'{"overhead_ram": [1]}',
        b'{"disk_bandwidth": 0}',
        b'{"overhead_ram": -1}',
        b'{"probed": "yes"}',
        b'{"flops": NaN}',
        b'{"flops": Infinity}',
        b'{"flops": true}',
    ],
)
def test_a_damaged_file_is_one_clear_line(home, text):
    home.mkdir()
    machine_file().write_bytes(text)
    with pytest.raises(TightfitError, match=r"machine\.json` is damaged") as caught:
        Machine.here()
    assert "tightfit probe" in caught.value.hint


def test_a_folder_in_the_files_place_is_one_clear_line(home):
    machine_file().mkdir(parents=True)
    with pytest.raises(TightfitError, match=r"machine\.json"):
        Machine.here()


def test_a_file_that_cannot_be_written_leaves_nothing_behind(home):
    home.write_text("a file where the folder should be")
    with pytest.raises(TightfitError, match="cannot write"):
        Machine().save()
    home.unlink()
    machine_file().mkdir(parents=True)
    with pytest.raises(TightfitError, match="cannot write"):
        Machine().save()
    assert os.listdir(home) == ["machine.json"]


def test_the_file_lies_in_the_cache_when_no_home_is_named(monkeypatch):
    monkeypatch.delenv("TIGHTFIT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert str(machine_file()) == "/caches/tightfit/machine.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/people/ada")
    assert str(machine_file()) == "/people/ada/.cache/tightfit/machine.json"


def test_overhead_is_the_tiers_own_and_a_share_of_the_tensors():
    machine = Machine(overhead_ram=1000, overhead_gpu=500, overhead_bitsandbytes=70, allocator_slack=0.1)
    assert machine.overhead("ram", 200) == 1020
    assert machine.overhead("ram", 200, frozenset({"bitsandbytes"})) == 1090
    assert machine.overhead("gpu", 200, frozenset({"bitsandbytes"})) == 520
