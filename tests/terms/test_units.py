"""Units: every way to write a size, what is no size, and how bytes and seconds are shown."""

import random
from decimal import Decimal

import pytest

from tightfit.terms.errors import TightfitError
from tightfit.terms.units import enough, parse_size, show_bytes, show_seconds

FACTORS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
FACTORS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@pytest.mark.parametrize("unit", FACTORS)
def test_size_is_number_times_unit(unit):
    random.seed(unit)
    for _ in range(300):
        number = random.choice([str(random.randint(1, 10**6)), f"{random.randint(1, 999)}.{random.randint(0, 999):03}"])
        written = random.choice([unit, unit.lower(), unit.upper()])
        text = random.choice(["", " "]) + number + random.choice(["", " ", "  "]) + written + random.choice(["", " "])
        assert parse_size(text) == int(Decimal(number) * FACTORS[unit]), text


def test_size_takes_a_plain_number():
    assert parse_size(4096) == 4096


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "GiB",
        "six GiB",
        "6 Gi",
        "6GiBs",
        "6bytes",
        "1e9",
        "-6GiB",
        "+6GiB",
        "6,5GiB",
        "6..5GiB",
        ".5GiB",
        "5.GiB",
        "6GiB 7GiB",
        "nan",
        "inf",
        "0x10",
        "½GiB",
        "6GiB\n7",
        "9" * 400 + "GiB",
        "9" * 5000,
        "None",
    ],
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(TightfitError, match="is not a size") as caught:
        parse_size(text)
    assert "`6GiB`" in caught.value.hint


@pytest.mark.parametrize("text", ["0", "0GiB", "0.0001B", "0.0"])
def test_a_size_of_nothing_is_refused(text):
    with pytest.raises(TightfitError, match="no room") as caught:
        parse_size(text)
    assert caught.value.hint


def test_bytes_are_shown_in_the_largest_unit_that_they_fill():
    shown = {0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 2**20: "1.0 MiB", 712 * 2**20: "712.0 MiB", 6 * 2**30: "6.00 GiB"}
    assert {size: show_bytes(size) for size in shown} == shown
    assert show_bytes(-1536) == "-1.5 KiB"


def test_shown_bytes_are_a_size_again():
    for size in [1, 1023, 1025, 3 * 2**19, 7 * 2**28, 5 * 2**32 + 12345]:
        assert parse_size(show_bytes(size).replace(" ", "")) == pytest.approx(size, rel=0.05)


def test_enough_is_a_size_that_holds_it_and_hardly_more():
    random.seed(1)
    for size in [
        1,
        1023,
        1024,
        1025,
        2**20 - 1,
        2**20,
        2**30 - 1,
        2**30,
        *(random.randint(1, 2 ** random.randint(1, 58)) for _ in range(2000)),
    ]:
        assert size <= parse_size(enough(size)) <= size * 1.01 + 1


def test_seconds_are_shown_for_people():
    assert [show_seconds(seconds) for seconds in (0.0032, 1.4, 59.99, 125.0)] == ["3.2 ms", "1.40 s", "59.99 s", "2 min 05 s"]
