"""Refresh: run what README and the guides show, and write down what was really said: `python docs/refresh.py [FILE…]`.

A block of ```console is a session: `$ command` lines and what they answer; ```bash, ```python and ```toml blocks have no answer.
A comment before a block says how it is run:

- `<!-- not run: reason -->`  left alone;
- `<!-- slow: reason -->`     run by the slow tests only;
- `<!-- own + 14MiB -->`      `--ram` stands for what this machine's Python and libraries take, and 14 MiB more;
- `<!-- with file: NAME -->`  the block under `<!-- file: NAME -->` lies among the techniques.

Tables between `<!-- table: NAME -->` and `<!-- end -->` are made anew from the catalogue. `tests/docs` runs the same blocks.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>console|bash|python)\n(?P<body>.*?)```", re.DOTALL)
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page; `mark` is the comment before it."""

    page: str
    line: int
    language: str
    mark: str
    body: str

    @property
    def runs(self) -> bool:
        """Whether the block is run at all."""
        return not self.mark.startswith("not run:")

    @property
    def own_and(self) -> str:
        """What a tight run may take above the machine's own memory; empty for other blocks."""
        return self.mark.removeprefix("own + ") if self.mark.startswith("own + ") else ""


@dataclass(frozen=True)
class Spoken:
    """A command and what it answers, stdout and stderr together."""

    command: str
    answer: str


def blocks_in(page: Path) -> list[Block]:
    """All blocks of a page that could be run, in order."""
    text, name = page.read_text(), str(page.relative_to(ROOT))
    return [
        Block(name, text.count("\n", 0, found.start()) + 1, found["language"], found["mark"] or "", found["body"])
        for found in _BLOCK.finditer(text)
    ]


def session(body: str) -> list[Spoken]:
    """The commands of a console block. A command goes on in the next line after a backslash."""
    parts = re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]
    return [Spoken(*_head(part)) for part in parts]


def _head(part: str) -> tuple[str, str]:
    found = re.match(r"(?:[^\n]*\\\n)*[^\n]*\n?", part)
    assert found is not None
    return found[0].strip(), part[found.end() :].rstrip("\n")


def with_own(command: str, more: str) -> str:
    """`command` with a `--ram` of this machine's own memory and `more`, in whole MiB."""
    from tightfit.terms.units import MIB, parse_size

    return re.sub(r"--ram \S+", f"--ram {(own_bytes() + parse_size(more)) // MIB}MiB", command)


@cache
def own_bytes() -> int:
    """What Python and its libraries take in a run, as `tightfit probe` measures it: the peak of a trial run less its tensors."""
    words = ["run", "tightfit-demo", "--max-new-tokens", "16", "--ram", "64GiB", "--json"]
    answer = subprocess.run([sys.executable, "-m", "tightfit", *words], capture_output=True, text=True, check=True, env=_environment())
    report = json.loads(answer.stdout)
    return max(report["process"]["load_peak"], report["process"]["run_peak"]) - report["measured_peak_bytes"] + _SPARE


_SPARE = 6 << 20
"""Bytes by which one run's own memory differs from another's."""


def _environment(home: str = "/nonexistent") -> dict[str, str]:
    """No traces of whoever runs it: an unprobed machine, the checkout's package, `tightfit` and `python` as those that run this."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {
        "TIGHTFIT_HOME": home,
        "HF_HUB_OFFLINE": "1",
        "PATH": path,
        "PYTHONPATH": str(ROOT / "src"),
        "PYTHONUNBUFFERED": "1",
    }


def file_in(page: Path, name: str) -> str:
    """The text of the file that a page shows under `<!-- file: NAME -->`."""
    found = re.search(rf"<!-- file: {re.escape(name)} -->\n```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert found is not None, f"{page} shows no `{name}`"
    return found[1]


_TIGHTFIT = (
    "import sys, tightfit.techniques as rooms; rooms.__path__.append(sys.argv.pop(1)); "
    "sys.argv[0] = 'tightfit'; from tightfit.cli import main; main()"
)
"""`tightfit`, with a folder of more techniques as its first argument."""


def shell(command: str, folder: Path, own_and: str = "") -> str:
    """What `command` says in a shell, stdout and stderr together; nothing is left of colours and bars."""
    home = Path("/nonexistent")
    if own_and:
        from tightfit.terms.machine import Machine

        machine = replace(Machine(), overhead_ram=own_bytes(), allocator_slack=0.0)  # its rates are guesses, and the plan says so
        home = folder / "home"
        home.mkdir(exist_ok=True)
        (home / "machine.json").write_text(json.dumps(asdict(machine)))
        command = with_own(command, own_and)
    said = subprocess.run(
        ["bash", "-c", f"tightfit() {{ {sys.executable} -c \"{_TIGHTFIT}\" {folder}/techniques \"$@\"; }}; {command}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=_environment(str(home)), check=False,
    )  # fmt: skip
    return tidy(said.stdout)


def lay_docs(folder: Path) -> None:
    """Let `docs/…` in a command be what it is in the checkout."""
    (folder / "docs").symlink_to(ROOT / "docs")


def tidy(text: str) -> str:
    """Without trailing blanks and empty lines at the ends."""
    return "\n".join(line.rstrip() for line in text.split("\n")).strip("\n")


def table(name: str) -> str:
    """A generated table, in Markdown."""
    return {"techniques": _techniques, "families": _families, "beside": _beside, "bits": _bits}[name]()


def _techniques() -> str:
    from tightfit.catalog import explain, technique, technique_names

    def fact(name: str, heading: str) -> str:
        found = re.search(rf"\*{heading}\*: (.*?)(?=\s\*[A-Z]|$)", explain(name)["text"], re.DOTALL)
        assert found is not None, f"`{name}` does not say: {heading}"
        return " ".join(found[1].split()).rstrip(".")

    rows = [
        f"| `{name}` | {technique(name).quality} | {fact(name, 'What shrinks')} | {fact(name, 'Paper')} |" for name in technique_names()
    ]
    return "\n".join(["| Technique | Quality | What shrinks | Paper |", "|---|---|---|---|", *rows])


def _families() -> str:
    from tightfit.presets import presets

    return ", ".join(f"`{name}`" for name in presets())


def _beside() -> str:
    """What `bigger_than_memory` measured, in the words of somebody who has a model and a machine."""
    models = {"a": "2.2 GB, nothing rounded", "b": "2.2 GB, `--quality near`", "c": "8.2 GB, brought to eight bits"}
    peers = {"accelerate": "accelerate's disk offload", "llama.cpp": "llama.cpp, Q8_0 with mmap"}
    rows = []
    for part, model in models.items():
        result = json.loads((ROOT / "bench" / "bigger_than_memory" / "results" / f"{part}.json").read_text())
        found, settings = result["summary"], result["settings"]
        floor = f", {found['over_floor']:.2f} times the disk's own time" if found["over_floor"] else ": all of it rests in RAM"
        beside = f"{peers[settings['peer']]}: {found['speedup']:.1f} times as long"
        rows.append(f"| {model} | {settings['ram']} | {found['seconds_per_token']:.2f} s{floor} | {beside} |")
    return "\n".join(["| A model of | in | a token takes | beside it |", "|---|---|---|---|", *rows])


def _bits() -> str:
    """What `quantize_quality` measured of each model at four, three and two bits, lean beside what it grew from."""
    models = {
        "demo": ("`tightfit-demo`", "perplexity"),
        "stories260k": ("stories260K", "perplexity"),
        "minilm": ("all-MiniLM-L6-v2", "cosine to the dense embeddings"),
    }
    ways = {"lean": "**lean**", "lean-affine-grouped": "lean, affine, grouped", "gptq-strong": "gptq, grouped and searched", "rtn": "rtn"}
    rows = []
    for model, (name, measure) in models.items():
        result = json.loads((ROOT / "bench" / "quantize_quality" / "results" / f"{model}.json").read_text())
        score = measure.split()[0]
        for way, called in ways.items():
            found = [result["summary"][bits].get(way) for bits in ("4", "3", "2")]
            cells = " | ".join(f"{each[score]:.3f} ({each['bits_per_weight']:.2f})" if each else "" for each in found)
            shown = f"{name}, {measure}: dense {result['dense'][score]:.3f}" if way == "lean" else ""
            rows.append(f"| {shown} | {called} | {cells} |")
    return "\n".join(["| Model | | 4 bits | 3 bits | 2 bits |", "|---|---|---|---|---|", *rows])


def refreshed(page: Path, folder: Path) -> str:
    """The page with every answer and table as it is now."""

    def answered(found: re.Match[str]) -> str:
        block = Block("", 0, found["language"], found["mark"] or "", found["body"])
        if found["language"] != "console" or not block.runs:
            return found[0]
        if block.mark.startswith("with file: "):
            name = block.mark.removeprefix("with file: ")
            (folder / "techniques").mkdir(exist_ok=True)
            (folder / "techniques" / name).write_text(file_in(page, name))
        told = ""
        for spoken in session(found["body"]):
            command = with_own(spoken.command, block.own_and) if block.own_and else spoken.command
            told += f"$ {command}\n{_line(_answer(spoken, block, folder))}"
        return found[0].replace(found["body"], told)

    text = _TABLE.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", page.read_text())
    return _BLOCK.sub(answered, text)


def _answer(spoken: Spoken, block: Block, folder: Path) -> str:
    said = shell(spoken.command, folder, block.own_and)
    if "…" in spoken.answer.split("\n"):  # what a page leaves out stays out
        shown = spoken.answer.split("\n")
        place, lines = shown.index("…"), said.split("\n")
        return "\n".join([*lines[:place], "…", *(lines[len(lines) - (len(shown) - place - 1) :])])
    return said


def _line(text: str) -> str:
    return f"{text}\n" if text else ""


def pages(names: list[str]) -> Iterator[Path]:
    """The pages that are named, or all."""
    yield from ([Path(name).resolve() for name in names] or PAGES)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))
    for page in pages(sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            lay_docs(Path(folder))
            page.write_text(refreshed(page, Path(folder)))
        print(page.relative_to(ROOT))
