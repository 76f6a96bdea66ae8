"""Budget: the bytes that a run may use on each tier. An absolute number, a cap and not a wish."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tightfit.terms.disk import free_disk
from tightfit.terms.errors import TightfitError
from tightfit.terms.units import parse_size

_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")

MOST_GPUS = 64
"""In one machine: more than there are."""


@dataclass(frozen=True)
class Budget:
    """Bytes per tier. `gpu` 0: compute on the CPU. `ram` is the whole process, interpreter included. `disk` is for spill files.

    With several `gpus`, which are alike, `gpu` is the cap of each.
    """

    ram: int
    gpu: int = 0
    disk: int = 0
    gpus: int = 1

    @classmethod
    def parse(cls, gpu: str | None = None, ram: str | None = None, disk: str | None = None) -> "Budget":
        """A budget from texts such as `6GiB`, or `2x24GiB` for two GPUs of 24 GiB each.

        What is not given is read from this machine; a GPU is used only where one is or is named, several only where they are named.
        """
        here = cls.here()
        gpus, size = (1, None) if gpu is None else _gpus(gpu)
        return cls(
            ram=here.ram if ram is None else parse_size(ram),
            gpu=size if size is not None else (0 if ram or disk else here.gpu),
            disk=here.disk if disk is None else parse_size(disk),
            gpus=gpus,
        )

    @classmethod
    def here(cls) -> "Budget":
        """What this machine has free now: RAM (a container's limit included), the first GPU's memory, disk under the spill folder."""
        return cls(ram=_free_ram(), gpu=_free_gpu(), disk=free_disk())

    @property
    def compute_tier(self) -> str:
        """Where the layers are computed: `gpu` if there is one in the budget, else `ram`."""
        return "gpu" if self.gpu else "ram"

    def bytes_of(self, tier: str) -> int:
        """The cap of `tier` (`gpu`, `ram` or `disk`); of each GPU where there are several."""
        return {"gpu": self.gpu, "ram": self.ram, "disk": self.disk}[tier]

    def refuse_several(self, doing: str, hint: str) -> None:
        """Raise `TightfitError` for several GPUs, of which `doing` would use one."""
        if self.gpus > 1:
            raise TightfitError(f"{doing} uses one GPU, and the budget has {self.gpus}", hint=hint)


def _gpus(text: str) -> tuple[int, int]:
    """How many GPUs, and the bytes of each, from `24GiB` or `2x24GiB`."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*[x×]\s*(.+)", text)
    count, size = (int(match[1]), match[2]) if match else (1, text)
    if not 0 < count <= MOST_GPUS:
        raise TightfitError(f"`{text}` is {count} GPUs", hint=f"name 1 to {MOST_GPUS} that are alike, such as `2x24GiB`")
    return count, parse_size(size)


def _free_ram() -> int:
    info = _numbers(_PROC / "meminfo")
    free = info["MemAvailable"] * 1024 if "MemAvailable" in info else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, min([free, *_cgroup_rooms()]))


def _cgroup_rooms() -> list[int]:
    """Bytes that each memory group around this process leaves to it: the limit, less what the others in the group hold for good."""
    rooms = []
    for group, limit_name, usage_name in _groups():
        limit, usage, kinds = _text(group / limit_name).strip(), _text(group / usage_name).strip(), _numbers(group / "memory.stat")
        if limit.isdigit():
            files = sum(kinds.get(f"total_{name}", kinds.get(name, 0)) for name in ("inactive_file", "active_file"))
            rooms.append(int(limit) - max(0, int(usage or 0) - files - _own_bytes()))
    return rooms


def _groups() -> list[tuple[Path, str, str]]:
    """The memory groups that this process is in, innermost first, with the names of their files for limit and use.

    A container may see its own group as the root and still be told the path outside, so folders that are not there are passed over.
    """
    found = []
    for line in _text(_PROC / "self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, names = _CGROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = _CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        inner = root / path.strip("/")
        found += [(group, *names) for group in (inner, *inner.parents) if group == root or root in group.parents]
    return found


def _own_bytes() -> int:
    """What this process holds itself; mapped files are left out, since a group counts them among its files."""
    status = _numbers(_PROC / "self/status")
    return 1024 * (status.get("RssAnon", 0) + status.get("RssShmem", 0))


def _numbers(file: Path) -> dict[str, int]:
    """The first number after each name in a file of lines such as `name 5` or `name: 5 kB`."""
    rows = [line.replace(":", " ", 1).split() for line in _text(file).splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _text(file: Path) -> str:
    """What the kernel says in `file`; nothing where there is none."""
    try:
        return file.read_text()
    except OSError:
        return ""


def _free_gpu() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    first = answer.stdout.split("\n")[0].strip()
    return int(first) * 1024**2 if first.isdigit() else 0
