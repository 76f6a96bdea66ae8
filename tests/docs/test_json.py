"""JSON: docs/json.md names every field of every `--json`, and none that is not there."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "json.md"


_LEFT = ("log.jsonl", "tightfit.json")


def documented(verb: str) -> set[str]:
    """The field names in the first table under the heading of `verb`."""
    part = PAGE.read_text().split(f"## {verb} --json\n")[1].split("\n## ")[0].split("\n`log.jsonl`")[0]
    return set(re.findall(r"^\| `([\w.]+)`", part, re.MULTILINE))


def fields_of(values: Mapping[str, Any], names: set[str]) -> set[str]:
    """The fields of a real answer, taken apart as deep as the page takes them apart; free keys as the page's word in capitals."""
    found = set()
    for key, value in values.items():
        below = {name.partition(".")[2] for name in names if name.startswith(f"{key}.")}
        if not below:
            found.add(key)
        elif all(name.isupper() for name in below):
            found |= {f"{key}.{name}" for name in below}
        else:
            found |= {f"{key}.{name}" for name in value}
    return found


@pytest.fixture
def answered(tightfit_says: Callable[..., Any], tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    (tmp_path / "some.txt").write_text("The sea was calm that morning. " * 30)
    (tmp_path / "some.jsonl").write_text('{"prompt": "The sea", "completion": " was calm."}\n' * 2)
    tuned = [tmp_path / "some.jsonl", "--ram", "4GiB", "--steps", "2", "--technique", "lora:rank=2"]
    words = {
        "plan": ["tightfit-demo", "--ram", "4GiB"],
        "run": ["tightfit-demo", "--ram", "4GiB", "--max-new-tokens", "3"],
        "eval": ["tightfit-demo", tmp_path / "some.txt", "--ram", "4GiB"],
        "tune": ["tightfit-demo", *tuned, "--eval", tmp_path / "some.jsonl", "-o", tmp_path / "out"],
        "export": [tmp_path / "out", "-o", tmp_path / "exported"],
        "quantize": ["tightfit-demo", tmp_path / "some.txt", "--context", "64", "--samples", "2", "-t", "rtn", "-o", tmp_path / "small"],
        "place": ["--graph", PAGE.parent / "sample-graph.json", "--devices", "2x1GB", "--seconds", "0"],
        "list": [],
        "explain": ["int8"],
        "demo": [],
    }

    def answer(verb: str) -> dict[str, Any]:
        if verb == "export":
            answer("tune")
        said = tightfit_says(verb, *words[verb], "--json")
        assert said.code == 0, said.err
        return json.loads(said.out)

    return answer


@pytest.mark.parametrize("verb", ["plan", "run", "eval", "tune", "export", "quantize", "place", "list", "explain", "demo"])
def test_page_names_the_fields_that_are_there(verb: str, answered: Callable[[str], dict[str, Any]]) -> None:
    names = documented(verb)
    assert fields_of(answered(verb), names) == names


def test_page_names_what_tuning_leaves_in_its_folder(answered: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    answered("tune")
    part = PAGE.read_text().split("## tune --json\n")[1].split("\n## ")[0]
    tables = {name: set(re.findall(r"^\| `(\w+)`", part.split(f"\n`{name}`")[1].split("\n`")[0], re.MULTILINE)) for name in _LEFT}
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert {name for line in lines for name in line} == tables["log.jsonl"]
    assert json.loads((tmp_path / "out" / "tightfit.json").read_text()).keys() == tables["tightfit.json"]
    request = json.loads((tmp_path / "out" / "request.json").read_text())
    named = set(re.findall(r"`([\w -]+)`", part.split("\n`request.json`")[1]))
    assert {name for name in request if not name.startswith("setting ")} <= named


def test_page_names_the_fields_of_the_probe() -> None:
    """Against the noun that `probe --json` prints, since probing takes a minute."""
    from tightfit.terms.machine import Machine

    assert documented("probe") == {*asdict(Machine()), "file"}


def test_page_names_the_kinds() -> None:
    from tightfit.terms.footprint import KINDS

    head = PAGE.read_text().split("\n## ")[0]
    assert set(KINDS) <= set(re.findall(r"`(\w+)`", head))
