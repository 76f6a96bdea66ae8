"""Disk: a folder that is memory is not one."""

from pathlib import Path

import pytest

from tightfit.terms import disk
from tightfit.terms.disk import file_system, free_disk, spill_folder
from tightfit.terms.errors import TightfitError

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:20 / {root}/memory rw,nosuid - tmpfs tmpfs rw,size=4k
24 22 8:2 / {root}/memory/disk rw shared:2 master:3 - xfs /dev/sdb1 rw
25 22 0:21 / {root}/mem rw - ramfs none rw
26 22 0:22 / {root}/with\\040space rw - btrfs /dev/sdc rw
27 22 8:3 / {root}/twice rw - ext4 /dev/sdd rw
28 27 0:23 / {root}/twice rw - tmpfs tmpfs rw
"""


@pytest.fixture
def mounts(tmp_path, monkeypatch):
    """A table of mounts below the test's folder, the folders themselves, and nobody who names one."""
    for name in ("memory/disk", "mem", "with space", "twice", "plain"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "mounts").write_text(MOUNTS.format(root=tmp_path))
    monkeypatch.setattr(disk, "_MOUNTS", tmp_path / "mounts")
    monkeypatch.delenv("TIGHTFIT_SPILL", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("plain", "ext4"),
        ("memory", "tmpfs"),
        ("memory/not/there/yet", "tmpfs"),
        ("memory/disk/deep", "xfs"),
        ("mem", "ramfs"),
        ("memo", "ext4"),
        ("with space/x", "btrfs"),
        ("twice", "tmpfs"),
    ],
)
def test_a_file_system_is_that_of_the_nearest_mount(folder, kind, mounts):
    assert file_system(mounts / folder) == kind


def test_links_are_followed(mounts):
    (mounts / "link").symlink_to(mounts / "memory")
    assert file_system(mounts / "link") == "tmpfs"


def test_where_there_is_no_table_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_MOUNTS", tmp_path / "none")
    assert file_system(tmp_path) == ""


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="a table of Linux")
def test_the_kernels_own_table():
    assert file_system(Path("/proc/self")) == "proc"


def test_a_temporary_folder_in_memory_is_passed_over(mounts, monkeypatch):
    monkeypatch.setattr(disk, "_ON_DISK", mounts / "memory/disk")
    monkeypatch.setenv("TMPDIR", str(mounts / "memory"))
    assert spill_folder() == mounts / "memory/disk"
    monkeypatch.setenv("TMPDIR", str(mounts / "plain"))
    assert spill_folder() == mounts / "plain"


@pytest.mark.parametrize("other", ["mem", "nowhere"])
def test_memory_alone_is_refused(other, mounts, monkeypatch):
    monkeypatch.setattr(disk, "_ON_DISK", mounts / other)
    monkeypatch.setenv("TMPDIR", str(mounts / "memory"))
    with pytest.raises(TightfitError, match=r"memory` is a `tmpfs`: what is written there stays in RAM") as caught:
        spill_folder()
    assert "TIGHTFIT_SPILL=" in caught.value.hint


def test_memory_that_somebody_names_is_refused(mounts, monkeypatch):
    monkeypatch.setattr(disk, "_ON_DISK", mounts / "memory/disk")
    monkeypatch.setenv("TIGHTFIT_SPILL", str(mounts / "mem"))
    with pytest.raises(TightfitError, match=r"mem` is a `ramfs`"):
        spill_folder()


def test_a_folder_of_memory_has_no_disk_to_give(mounts, monkeypatch):
    monkeypatch.setenv("TIGHTFIT_SPILL", str(mounts / "mem"))
    assert free_disk() == 0
    monkeypatch.setenv("TIGHTFIT_SPILL", str(mounts / "plain"))
    assert free_disk() > 0


def test_the_spill_folder_is_named_or_the_temporary_one(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/there")
    monkeypatch.delenv("TIGHTFIT_SPILL", raising=False)
    assert str(spill_folder()) == "/there"
    monkeypatch.setenv("TIGHTFIT_SPILL", "/elsewhere")
    assert str(spill_folder()) == "/elsewhere"
    monkeypatch.delenv("TMPDIR")
    monkeypatch.delenv("TIGHTFIT_SPILL")
    assert str(spill_folder()) == "/tmp"
