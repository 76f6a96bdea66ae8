"""Errors: the line, its hint, and near names."""

from tightfit.terms.errors import DoesNotFit, TightfitError, near


def test_error_is_its_line():
    error = DoesNotFit("too big", hint="buy more", details="a lot")
    assert isinstance(error, TightfitError)
    assert (str(error), error.hint, error.details) == ("too big", "buy more", "a lot")


def test_near_names_what_is_close():
    assert near("itn8", ["int8", "nf4", "offload"]) == "did you mean `int8`?"


def test_near_lists_all_when_nothing_is_close():
    assert near("zzz", ["nf4", "int8"]) == "known: int8, nf4"
    assert near("zzz", []) == ""
