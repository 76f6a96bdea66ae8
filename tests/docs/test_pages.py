"""Pages: README and the guides say what is so. Their commands run, their answers are today's, their links and tables hold."""

import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "docs"))
refresh: Any = importlib.import_module("refresh")
sys.path.remove(str(ROOT / "docs"))

Says = Callable[[str, Any], str]
Lay = Callable[[Path, str], None]

PAGES = {str(page.relative_to(ROOT)): page for page in refresh.PAGES if page.name != "benchmarks.md"}
WITH_BLOCKS = [name for name, page in PAGES.items() if any(block.runs for block in refresh.blocks_in(page))]

_DURATION = re.compile(r"\d+ min \d+ s|\d[\d.]* (?:ms|s)\b")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_TEXT_OF_A_RUN = re.compile(r"^(?:The sea was calm|### Instruction:).*?(?=^ +planned)", re.DOTALL | re.MULTILINE)
_PACE_LINES = re.compile(r"^  (?:because|not taken|note|pace) .*\n?", re.MULTILINE)
_TOLERANCE = 0.1
"""Sizes may change by this share between versions of torch and transformers before a page must be refreshed."""


def words_of(text: str) -> str:
    """What must be equal on every machine: not figures, bars or blocks, a run's text, nor what depends on how fast the machine is."""
    text = _PACE_LINES.sub("", _TEXT_OF_A_RUN.sub("", text + "\n"))
    text = re.sub(r"[■·█▒░]+", "■", _NUMBER.sub("0", _DURATION.sub("0 s", text)))
    text = re.sub(r"(?:[KMG]i)?B\b", "B", re.sub(r"[+-]0%", "0%", text))
    return "\n".join(" ".join(line.split()) for line in text.split("\n") if line.strip() not in ("", "…"))


def sizes_of(text: str) -> list[float]:
    """All sizes that a plan for named budgets shows, in MiB."""
    factor = {"KiB": 2**-10, "MiB": 1.0, "GiB": 2.0**10}
    return [float(number) * factor[unit] for number, unit in re.findall(r"(\d[\d.]*) ([KMG]iB)", text)]


def same_words(shown: str, said: str) -> bool:
    """Whether a page shows what is said today; `…` stands for any lines."""
    pieces = [words_of(piece) for piece in re.split(r"^…$", shown, flags=re.MULTILINE)]
    seen = words_of(said)
    if len(pieces) == 1:
        return pieces[0] == seen
    return seen.startswith(pieces[0]) and seen.endswith(pieces[-1])


_TOLD: dict[str, str] = {}
"""What was said already, since pages show some commands again. What reads or writes files is asked anew."""


@pytest.fixture
def says(tightfit_says: Callable[..., Any], tmp_path: Path) -> Says:
    """What a command says: in this process where that is the same, since a new one takes seconds."""
    refresh.lay_docs(tmp_path)

    def answer(command: str, block: refresh.Block) -> str:
        if block.own_and or re.search(r"[|;&<>$]|^tightfit tune", command) or not command.startswith("tightfit "):
            return refresh.shell(command, tmp_path, block.own_and)
        said = tightfit_says(*shlex.split(command)[1:])
        return refresh.tidy(said.err + said.out if said.code else said.out + said.err)

    def once(command: str, block: refresh.Block) -> str:
        key = re.sub(r"--ram \S+", f"--ram own + {block.own_and}", command) if block.own_and else command
        if key not in _TOLD or re.search(r"--save|--plan|report|slice_mlp|[>]|tightfit (?:tune|export)|--adapter", command):
            _TOLD[key] = answer(command, block)
        return _TOLD[key]

    return once


@pytest.fixture
def with_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lay:
    """Lay a file that a page shows where techniques are found."""

    def lay(page: Path, name: str) -> None:
        import tightfit.techniques
        from tightfit import catalog

        (tmp_path / "techniques").mkdir(exist_ok=True)
        (tmp_path / "techniques" / name).write_text(refresh.file_in(page, name))
        monkeypatch.setattr(tightfit.techniques, "__path__", [*tightfit.techniques.__path__, str(tmp_path / "techniques")])
        monkeypatch.delitem(sys.modules, f"tightfit.techniques.{name.removesuffix('.py')}", raising=False)
        catalog.technique.cache_clear()

    return lay


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_what_a_page_shows_is_what_is_said(name: str, says: Says, with_file: Lay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page, names, faults = PAGES[name], {"__name__": "page"}, []
    for block in [block for block in refresh.blocks_in(page) if block.runs and not block.mark.startswith("slow:")]:
        if block.mark.startswith("with file: "):
            with_file(page, block.mark.removeprefix("with file: "))
        if block.language == "python":
            exec(compile(block.body, f"{name}:{block.line}", "exec", dont_inherit=True), names)
        else:
            faults += faults_of(block, says)
    assert not faults, "\n\n".join(faults) + "\n\nhint: `python docs/refresh.py` writes what is said today"


@pytest.mark.slow
@pytest.mark.parametrize("block", [block for page in PAGES.values() for block in refresh.blocks_in(page) if block.mark.startswith("slow:")])
def test_what_slow_blocks_show_is_what_is_said(block: refresh.Block, says: Says) -> None:
    assert not faults_of(block, says)


def faults_of(block: refresh.Block, says: Says) -> list[str]:
    """What a console block shows that is not so today."""
    faults = []
    for spoken in refresh.session(block.body):
        place, said = f"{block.page}:{block.line} $ {spoken.command}", says(spoken.command, block)
        if not same_words(spoken.answer, said):
            faults.append(f"{place}\n--- shown\n{spoken.answer}\n--- said\n{said}")
        elif re.search(r"tightfit plan .*--ram", spoken.command) and "…" not in spoken.answer:
            shown_sizes, said_sizes = sizes_of(spoken.answer), sizes_of(said)
            if shown_sizes != pytest.approx(said_sizes, rel=_TOLERANCE):
                faults.append(f"{place}\n--- shown {shown_sizes}\n--- said {said_sizes}")
    return faults


def test_the_new_technique_shrinks_what_it_says_and_changes_nothing_else(tightfit_says: Callable[..., Any], with_file: Lay) -> None:
    with_file(PAGES["docs/new-technique.md"], "slice_mlp.py")
    assert "slice_mlp" in tightfit_says("list").out
    told = []
    for more in ([], ["--technique", "slice_mlp:slices=16"]):
        prompt = ["--prompt", "the sea was calm and " * 60, "--max-new-tokens", "4", "--ram", "8GiB", "--json"]
        said = tightfit_says("run", "tightfit-demo", *prompt, *more)
        assert said.code == 0, said.err
        told.append(json.loads(said.out))
    plain, sliced = told
    assert sliced["plan"]["predicted"]["ram"]["activations"] < plain["plan"]["predicted"]["ram"]["activations"]
    assert sliced["text"] == plain["text"]
    assert sliced["warnings"] == plain["warnings"] == []


def test_the_check_sees_a_change() -> None:
    assert same_words("weights 1.00 GiB, in 3.2 ms", "weights 1.02 GiB, in 1 min 03 s")
    assert not same_words("weights 1.00 GiB", "weight 1.00 GiB")
    assert same_words("a\n…\nz", "a\nb\nz")
    assert not same_words("a\n…\nz", "a\nb\ny")
    assert sizes_of("1.5 GiB of 512.0 MiB") == [1536.0, 512.0]


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_the_catalogues(name: str) -> None:
    for found in re.finditer(r"<!-- table: (\w+) -->\n(.*?)\n<!-- end -->", PAGES[name].read_text(), re.DOTALL):
        assert found[2] == refresh.table(found[1]), "hint: `python docs/refresh.py`"


def test_readme_has_its_tables() -> None:
    text = PAGES["README.md"].read_text()
    assert all(f"<!-- table: {name} -->" in text for name in ("techniques", "families", "beside"))


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_relative_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", prose):
        file, _, anchor = target.partition("#")
        reached = (page.parent / file).resolve() if file else page
        assert reached.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", reached.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles], target


def test_blocks_of_every_kind_are_found() -> None:
    """So that a change of the convention cannot switch the checks off without a word."""
    found = [block for page in PAGES.values() for block in refresh.blocks_in(page)]
    assert sum(block.language == "console" and block.runs for block in found) >= 15
    assert sum(block.language == "python" and block.runs for block in found) >= 8
    assert sum(bool(block.own_and) for block in found) >= 2
    assert all(block.language == "console" or block.language == "python" or not block.runs for block in found), (
        "bash blocks: console, or not run"
    )
