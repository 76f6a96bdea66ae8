"""Errors that a person reads: one clear line, what is had and needed, and a hint."""

import difflib
from collections.abc import Iterable


class TightfitError(Exception):
    """A fault that the user can mend. `str(error)` is the line; `hint` says what would help; exit code 1."""

    def __init__(self, message: str, hint: str = "", details: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        self.details = details


class DoesNotFit(TightfitError):
    """No plan stays inside the budget. Raised before a weight is read."""


def near(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest of `known`: `did you mean …?`, or the whole list when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f"`{word}`" for word in close) + "?"
    return "known: " + ", ".join(known) if known else ""
