"""Budget: what the machine has, a container's limit included, and what the user says instead."""

import pytest

from tightfit.terms import budget
from tightfit.terms.budget import Budget, spill_folder
from tightfit.terms.errors import TightfitError

GIB = 2**30


@pytest.fixture
def limits(tmp_path, monkeypatch):
    """Write the files of a cgroup v2 and of a v1 group; None leaves one out. A machine with plenty of free memory."""

    def write(v2=None, v1=None):
        paths = []
        for name, text in (("memory.max", v2), ("memory.limit_in_bytes", v1)):
            paths.append(str(tmp_path / name))
            if text is not None:
                (tmp_path / name).write_text(text)
        monkeypatch.setattr(budget, "_CGROUP_LIMITS", tuple(paths))

    monkeypatch.setenv("TIGHTFIT_SPILL", str(tmp_path))
    return write


def test_a_version_2_limit_is_the_ram(limits):
    limits(v2="12345678\n")
    assert Budget.here().ram == 12345678


def test_a_version_1_limit_is_the_ram(limits):
    limits(v1="23456789\n")
    assert Budget.here().ram == 23456789


def test_the_tighter_limit_counts(limits):
    limits(v2="3000000\n", v1="2000000\n")
    assert Budget.here().ram == 2000000


@pytest.mark.parametrize("words", [{"v2": "max\n"}, {"v1": f"{(1 << 63) - 4096}\n"}, {}])
def test_no_limit_leaves_the_free_memory(limits, words):
    limits(**words)
    with open("/proc/meminfo") as info:
        whole = int(next(line for line in info if line.startswith("MemTotal")).split()[1]) * 1024
    assert 0 < Budget.here().ram <= whole


def test_what_is_said_counts(limits):
    limits(v2="12345678\n")
    parsed = Budget.parse(gpu="6GiB", ram="16GB", disk="100MiB")
    assert (parsed.gpu, parsed.ram, parsed.disk) == (6 * GIB, 16 * 10**9, 100 * 2**20)


def test_what_is_not_said_is_read(limits):
    limits(v2="12345678\n")
    parsed = Budget.parse(disk="1GiB")
    assert (parsed.gpu, parsed.ram, parsed.disk) == (0, 12345678, GIB)


@pytest.mark.parametrize("name", ["gpu", "ram", "disk"])
@pytest.mark.parametrize("text", ["", "lots", "0"])
def test_what_is_no_size_is_no_budget(limits, name, text):
    with pytest.raises(TightfitError):
        Budget.parse(**{name: text})


def test_the_gpu_computes_where_it_is_in_the_budget():
    assert Budget(ram=1).compute_tier == "ram"
    assert Budget(ram=1, gpu=1).compute_tier == "gpu"
    assert [Budget(ram=1, gpu=2, disk=3).bytes_of(tier) for tier in ("ram", "gpu", "disk")] == [1, 2, 3]


def test_the_spill_folder_is_named_or_the_temporary_one(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/there")
    monkeypatch.delenv("TIGHTFIT_SPILL", raising=False)
    assert str(spill_folder()) == "/there"
    monkeypatch.setenv("TIGHTFIT_SPILL", "/elsewhere")
    assert str(spill_folder()) == "/elsewhere"
    monkeypatch.delenv("TMPDIR")
    monkeypatch.delenv("TIGHTFIT_SPILL")
    assert str(spill_folder()) == "/tmp"


def test_a_spill_folder_that_is_not_there_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setenv("TIGHTFIT_SPILL", str(tmp_path / "nowhere"))
    with pytest.raises(TightfitError, match="nowhere") as caught:
        Budget.here()
    assert "TIGHTFIT_SPILL" in caught.value.hint
