"""Process: what the kernel says this process holds, and how freed memory is given back to it."""

import ctypes
import ctypes.util
import gc
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


KERNELS = 64
"""Shapes of products whose kernels are kept: more than a step of any dense model has."""


@dataclass(frozen=True)
class Resident:
    """Bytes of RAM: all, the process's own (`anonymous`), mapped files such as libraries (`file`), and the highest ever (`peak`)."""

    total: int
    anonymous: int
    file: int
    peak: int


def resident() -> Resident:
    """What the process holds now. Where there is no `/proc` only the peak is known, and stands for all."""
    if not _STATUS.exists():
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Resident(peak, peak, 0, peak)
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    sizes = {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon", "RssFile", "VmHWM")}
    return Resident(sizes["VmRSS"], sizes["RssAnon"], sizes["RssFile"], sizes["VmHWM"])


def reset_peak() -> None:
    """Let the kernel's peak begin anew from what is held now, so that loading and running are told apart."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak then spans the whole life of the process, which errs on the safe side


def keep_heap_tight(threshold: int = 256 << 10) -> None:
    """Let glibc give every block above `threshold` bytes back to the kernel as soon as it is freed, and oneDNN keep few kernels.

    By itself glibc raises the threshold to 32 MiB at the first large free, and then keeps what a budget has no room for. oneDNN keeps
    half a MiB for each of 1,024 shapes of products, and an expert's product has a new shape whenever it gets another number of tokens.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))  # read at the first product
    library = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    if _has(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, threshold)
        library.mallopt(_M_TRIM_THRESHOLD, threshold)


def keep_heap_loose() -> None:
    """Let glibc keep freed blocks of up to 32 MiB for the next step: a third of a step's time goes into fresh pages otherwise.

    What it keeps lies scattered: up to a quarter of a step's own bytes, seen with a model of 160 million parameters.
    """
    keep_heap_tight(32 << 20)


def keep_quiet() -> None:
    """Let the libraries beneath say only errors; what a person must know, tightfit says itself."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*")


def return_freed_memory() -> None:
    """Collect what Python no longer needs and let glibc give its free pages back."""
    gc.collect()
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    if _has(library, "malloc_trim"):
        library.malloc_trim(0)


def _has(library: ctypes.CDLL, name: str) -> bool:
    try:
        library[name]
    except AttributeError:
        return False
    return True
