"""Disk: the folder where blocks rest while they do not fit in memory, and whether it is a disk at all."""

import os
import re
import shutil
from pathlib import Path

from tightfit.terms.errors import TightfitError

IN_RAM = frozenset({"tmpfs", "ramfs", "devtmpfs"})
"""File systems whose files are memory: a block that rests there has not left the process's share of it (its cgroup pays)."""

_MOUNTS = Path("/proc/self/mountinfo")
_ON_DISK = Path("/var/tmp")
"""Where temporary files lie on a disk also on systems whose `/tmp` is memory (Filesystem Hierarchy Standard, 5.15)."""


def spill_folder() -> Path:
    """`TIGHTFIT_SPILL`, else the temporary folder, else, where that is memory, `/var/tmp`. Raises `TightfitError` if all are memory."""
    named = os.environ.get("TIGHTFIT_SPILL")
    folder = Path(named or os.environ.get("TMPDIR") or "/tmp")
    if file_system(folder) not in IN_RAM:
        return folder
    if not named and file_system(_ON_DISK) not in IN_RAM and os.access(_ON_DISK, os.W_OK):
        return _ON_DISK
    raise TightfitError(
        f"the spill folder `{folder}` is a `{file_system(folder)}`: what is written there stays in RAM",
        hint="name a folder on a disk, such as `TIGHTFIT_SPILL=/var/tmp`",
    )


def free_disk() -> int:
    """Bytes that the spill folder's disk has room for; none where its files would be memory."""
    try:
        return shutil.disk_usage(spill_folder()).free
    except TightfitError:
        return 0
    except OSError as error:
        raise TightfitError(
            f"the spill folder `{spill_folder()}` cannot be used: {error.strerror}", hint="name another one with `TIGHTFIT_SPILL`"
        ) from error


def file_system(folder: Path) -> str:
    """The type of the file system that `folder` lies on: that of the nearest mount point above it; empty where there is no `/proc`."""
    if not _MOUNTS.exists():
        return ""
    path, found, kind = os.path.realpath(folder), "", ""
    for line in _MOUNTS.read_text(errors="replace").splitlines():
        mount, _, rest = line.partition(" - ")  # proc(5): the fifth field is the mount point; after the dash comes the type
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), mount.split()[4])
        if os.path.commonpath([point, path]) == point and len(point) >= len(found):  # of two at one place the later one is seen
            found, kind = point, rest.split()[0]
    return kind
