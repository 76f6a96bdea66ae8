"""Units: sizes as people write them, and the one function that shows bytes."""

import math
import re
from fractions import Fraction

from tightfit.terms.errors import TightfitError

KIB, MIB, GIB = 1024, 1024**2, 1024**3

_FACTOR = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1024**4,
    "k": KIB,
    "m": MIB,
    "g": GIB,
    "t": 1024**4,
}


def parse_size(text: str | int) -> int:
    """Bytes from `6GiB`, `6GB`, `800 MB`, `6g` (binary, as in Docker) or a plain number of bytes.

    Raises `TightfitError` for anything else, and for sizes that are not above zero.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-zA-Z]*)\s*", str(text), re.ASCII)
    factor = _FACTOR.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise TightfitError(f"`{text}` is not a size", hint="write a number and a unit, such as `6GiB`, `6GB` or `800MiB`")
    size = int(Fraction(match[1]) * factor)
    if size <= 0:
        raise TightfitError(f"a size of `{text}` leaves no room at all", hint="give a budget above zero, such as `2GiB`")
    return size


def show_bytes(size: int) -> str:
    """`size` bytes for people: `712 B`, `3.1 KiB`, `512.0 MiB`, `6.00 GiB`."""
    if abs(size) >= GIB:
        return f"{size / GIB:.2f} GiB"
    if abs(size) >= MIB:
        return f"{size / MIB:.1f} MiB"
    if abs(size) >= KIB:
        return f"{size / KIB:.1f} KiB"
    return f"{size} B"


def enough(size: int) -> str:
    """The size to type that holds `size` bytes, rounded up: `712`, `1.01MiB`, `482.37MiB`, `48GiB`."""
    for factor, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= factor:
            return f"{math.ceil(size / factor * 100) / 100:.2f}".rstrip("0").rstrip(".") + unit
    return str(size)


def show_seconds(seconds: float) -> str:
    """A duration for people: `3.2 ms`, `1.40 s`, `2 min 05 s`."""
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
