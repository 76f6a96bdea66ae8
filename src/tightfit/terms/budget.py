"""Budget: the bytes that a run may use on each tier. An absolute number, a cap and not a wish."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tightfit.terms.errors import TightfitError
from tightfit.terms.units import parse_size

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Budget:
    """Bytes per tier. `gpu` 0: compute on the CPU. `ram` is the whole process, interpreter included. `disk` is for spill files."""

    ram: int
    gpu: int = 0
    disk: int = 0

    @classmethod
    def parse(cls, gpu: str | None = None, ram: str | None = None, disk: str | None = None) -> "Budget":
        """A budget from texts such as `6GiB`. What is not given is read from this machine; a GPU is used only where one is or is named."""
        here = cls.here()
        return cls(
            ram=here.ram if ram is None else parse_size(ram),
            gpu=parse_size(gpu) if gpu is not None else (0 if ram or disk else here.gpu),
            disk=here.disk if disk is None else parse_size(disk),
        )

    @classmethod
    def here(cls) -> "Budget":
        """What this machine has free now: RAM (a container's limit included), GPU memory, disk under the spill folder."""
        return cls(ram=_free_ram(), gpu=_free_gpu(), disk=_free_disk())

    @property
    def compute_tier(self) -> str:
        """Where the layers are computed: `gpu` if there is one in the budget, else `ram`."""
        return "gpu" if self.gpu else "ram"

    def bytes_of(self, tier: str) -> int:
        """The cap of `tier` (`gpu`, `ram` or `disk`)."""
        return {"gpu": self.gpu, "ram": self.ram, "disk": self.disk}[tier]


def spill_folder() -> Path:
    """Where quantized or converted blocks rest on disk while they do not fit in memory: `TIGHTFIT_SPILL`, else the temporary folder."""
    return Path(os.environ.get("TIGHTFIT_SPILL") or os.environ.get("TMPDIR") or "/tmp")


def _free_ram() -> int:
    info = Path("/proc/meminfo").read_text() if os.path.exists("/proc/meminfo") else ""
    lines = dict(line.split(":", 1) for line in info.splitlines())
    free = (
        int(lines["MemAvailable"].split()[0]) * 1024
        if "MemAvailable" in lines
        else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    limits = [Path(path).read_text().strip() for path in _CGROUP_LIMITS if os.path.exists(path)]
    return min([free, *(int(limit) for limit in limits if limit.isdigit())])


def _free_disk() -> int:
    try:
        return shutil.disk_usage(spill_folder()).free
    except OSError as error:
        raise TightfitError(
            f"the spill folder `{spill_folder()}` cannot be used: {error.strerror}", hint="name another one with `TIGHTFIT_SPILL`"
        ) from error


def _free_gpu() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    first = answer.stdout.split("\n")[0].strip()
    return int(first) * 1024**2 if first.isdigit() else 0
