"""Budget: what the machine has, the limits of all groups around the process included, and what the user says instead."""

import os

import pytest

from tightfit.terms import budget
from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError

GIB = 2**30
MIB = 2**20
AVAILABLE = 40 * GIB
OWN = 3 * MIB  # of which 1 MiB is shared memory; the 100 MiB of mapped files beside it count with the group's files


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with 40 GiB free whose kernel says that the process is in `groups` (lines of `/proc/self/cgroup`)."""
    monkeypatch.setenv("TIGHTFIT_SPILL", str(tmp_path))
    monkeypatch.setattr(budget, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(budget, "_CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(
        f"MemTotal:       99999999 kB\nMemAvailable:   {AVAILABLE // 1024} kB\nHugePages_Total:       0\n"
    )
    (tmp_path / "proc/self/status").write_text(
        "Name:\tpython\nVmRSS:\t  105472 kB\nRssAnon:\t    2048 kB\nRssFile:\t  102400 kB\nRssShmem:\t    1024 kB\n"
    )

    def inside(*groups: str) -> None:
        (tmp_path / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in groups))

    inside("0::/")
    return inside


@pytest.fixture
def v2(tmp_path, machine):
    """Write a group of the unified hierarchy; None leaves the file of its limit out, as the real root does."""

    def write(path: str, limit: object = None, used: int = 0, **files: int) -> None:
        _write(tmp_path / "cgroup" / path, {"memory.max": limit, "memory.current": used}, {"anon": used, "inactive_file": 0} | files)

    return write


@pytest.fixture
def v1(tmp_path, machine):
    """Write a group of the `memory` controller, whose `total_…` lines count the groups below it too."""

    def write(path: str, limit: object, used: int = 0, **files: int) -> None:
        limits = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used}
        _write(tmp_path / "cgroup/memory" / path, limits, {"cache": 9, "rss": 9, "inactive_file": 5, "active_file": 5} | files)

    return write


def _write(folder, files, stat):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        if value is not None:
            (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))


def test_without_groups_the_free_memory_counts(machine):
    assert Budget.here().ram == AVAILABLE
    machine()
    assert Budget.here().ram == AVAILABLE


def test_without_a_kernel_that_tells_all_memory_counts(machine, tmp_path):
    for file in (tmp_path / "proc/meminfo", tmp_path / "proc/self/cgroup", tmp_path / "proc/self/status"):
        file.unlink()
    assert Budget.here().ram == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_limit_at_the_root_counts(v2):
    v2("", 12345678)
    assert Budget.here().ram == 12345678


def test_a_version_2_limit_counts_at_every_height(machine, v2):
    machine("0::/pod/container/job")
    v2("", None)
    v2("pod", 7 * GIB)
    v2("pod/container", "max")
    v2("pod/container/job", 9 * GIB)
    assert Budget.here().ram == 7 * GIB
    v2("pod/container/job", 2 * GIB)
    assert Budget.here().ram == 2 * GIB
    v2("pod/other", 1 * GIB)
    assert Budget.here().ram == 2 * GIB, "another's limit is none of ours"


def test_a_version_1_limit_counts_at_every_height(machine, v1):
    machine("9:name=systemd:/elsewhere", "4:cpu,memory:/pod/job", "0::/")
    v1("", (1 << 63) - 4096)
    v1("pod", 6 * GIB)
    v1("pod/job", 8 * GIB)
    assert Budget.here().ram == 6 * GIB
    v1("pod/job", 5 * GIB)
    assert Budget.here().ram == 5 * GIB


def test_only_the_memory_controllers_path_counts(machine, v1):
    machine("9:memory_like:/small", "4:memory:/large")
    v1("small", GIB)
    v1("large", 2 * GIB)
    assert Budget.here().ram == 2 * GIB


def test_a_container_that_is_told_its_path_outside_finds_its_limit_at_the_root(machine, v1):
    machine("4:memory:/docker/0123456789abcdef")
    v1("", 3 * GIB)
    assert Budget.here().ram == 3 * GIB


def test_the_tighter_of_both_versions_counts(machine, v1, v2):
    machine("4:memory:/", "0::/")
    v2("", 3000000)
    v1("", 2000000)
    assert Budget.here().ram == 2000000


def test_what_others_in_the_group_hold_is_not_free(machine, v2):
    """1000 MiB are used: 200 of files that can be read again, 3 by this process, so 797 by others."""
    machine("0::/pod/job")
    v2("pod", 4 * GIB, 1000 * MIB, inactive_file=150 * MIB, active_file=50 * MIB, unevictable=70 * MIB)
    v2("pod/job", 4 * GIB, OWN)
    assert Budget.here().ram == 4 * GIB - 797 * MIB


def test_an_outer_group_that_others_fill_is_tighter_than_the_own_limit(machine, v2):
    machine("0::/pod/job")
    v2("pod", 4 * GIB, 3 * GIB + OWN)
    v2("pod/job", 2 * GIB, OWN)
    assert Budget.here().ram == GIB


def test_version_1_tells_the_files_of_the_groups_below_too(machine, v1):
    machine("4:memory:/job")
    v1("job", 4 * GIB, 1000 * MIB, total_inactive_file=150 * MIB, total_active_file=50 * MIB)
    assert Budget.here().ram == 4 * GIB - 797 * MIB


def test_what_this_process_holds_itself_stays_its_own(machine, v2):
    v2("", GIB, OWN)
    assert Budget.here().ram == GIB
    v2("", GIB, OWN - 1, inactive_file=MIB)
    assert Budget.here().ram == GIB, "others never hold less than nothing"


def test_a_group_that_others_overfill_leaves_nothing(v2):
    v2("", GIB, 2 * GIB)
    assert Budget.here().ram == 0


def test_the_real_kernel_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("TIGHTFIT_SPILL", str(tmp_path))
    with open("/proc/meminfo") as info:
        whole = int(next(line for line in info if line.startswith("MemTotal")).split()[1]) * 1024
    assert 0 < Budget.here().ram <= whole


def test_what_is_said_counts(v2):
    v2("", 12345678)
    parsed = Budget.parse(gpu="6GiB", ram="16GB", disk="100MiB")
    assert (parsed.gpu, parsed.ram, parsed.disk) == (6 * GIB, 16 * 10**9, 100 * 2**20)


@pytest.mark.parametrize(
    ("text", "gpus", "size"), [("24GiB", 1, 24 * GIB), ("2x24GiB", 2, 24 * GIB), (" 4 × 800MiB", 4, 800 * MIB), ("1x6GB", 1, 6 * 10**9)]
)
def test_several_gpus_that_are_alike(machine, text, gpus, size):
    parsed = Budget.parse(gpu=text)
    assert (parsed.gpus, parsed.gpu, parsed.bytes_of("gpu")) == (gpus, size, size)


@pytest.mark.parametrize(
    "text", ["0x24GiB", "65x24GiB", "999999x1GiB", "2x", "x24GiB", "2x0GiB", "2x2x8GiB", "-2x8GiB", "2x24GiB,8GiB", "2*8GiB"]
)
def test_what_names_no_gpus_is_refused(machine, text):
    with pytest.raises(TightfitError) as caught:
        Budget.parse(gpu=text)
    assert caught.value.hint


def test_several_gpus_are_used_only_where_they_are_named(machine):
    assert Budget.here().gpus == Budget.parse().gpus == Budget.parse(ram="1GiB").gpus == 1


def test_work_for_one_gpu_refuses_several():
    Budget(1, 1).refuse_several("tuning", "")
    with pytest.raises(TightfitError, match="tuning uses one GPU, and the budget has 2") as caught:
        Budget(1, 1, gpus=2).refuse_several("tuning", "name one")
    assert caught.value.hint == "name one"


def test_what_is_not_said_is_read(v2):
    v2("", 12345678)
    parsed = Budget.parse(disk="1GiB")
    assert (parsed.gpu, parsed.ram, parsed.disk) == (0, 12345678, GIB)


@pytest.mark.parametrize("name", ["gpu", "ram", "disk"])
@pytest.mark.parametrize("text", ["", "lots", "0"])
def test_what_is_no_size_is_no_budget(machine, name, text):
    with pytest.raises(TightfitError):
        Budget.parse(**{name: text})


def test_the_gpu_computes_where_it_is_in_the_budget():
    assert Budget(ram=1).compute_tier == "ram"
    assert Budget(ram=1, gpu=1).compute_tier == "gpu"
    assert [Budget(ram=1, gpu=2, disk=3).bytes_of(tier) for tier in ("ram", "gpu", "disk")] == [1, 2, 3]


def test_a_spill_folder_that_is_not_there_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setenv("TIGHTFIT_SPILL", str(tmp_path / "nowhere"))
    with pytest.raises(TightfitError, match="nowhere") as caught:
        Budget.here()
    assert "TIGHTFIT_SPILL" in caught.value.hint
