"""Fixtures that many tests share: saved families, the command line called in this process, and no traces of this user's machine."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples every time: a fault that is drawn once in a hundred runs is looked for by hand.
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")


@dataclass(frozen=True)
class Said:
    """What one call of the command line did: its exit code, and what it said."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the probe's file of whoever runs it, and none asks the network."""
    monkeypatch.setenv("TIGHTFIT_HOME", str(tmp_path_factory.getbasetemp() / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model, as `save_pretrained` writes it; made once. Not to be written to."""
    root = tmp_path_factory.mktemp("families")

    def folder(family: str) -> Path:
        from families import make

        if not (root / family).exists():
            make(family).save_pretrained(root / family)
        return root / family

    return folder


@pytest.fixture
def tightfit_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """`tightfit ARGUMENTS`, without a new process, which would take seconds."""
    from tightfit.cli import main

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["tightfit", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as leave:
            code = leave.code if isinstance(leave.code, int) else 1
        return Said(code, *capsys.readouterr())

    return call
