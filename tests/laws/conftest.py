"""Fixtures of law 7: a command line that must refuse, models with something wrong, and plans by hand."""

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tightfit.planner.residency import resident
from tightfit.terms.budget import Budget
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload


def files_in(*folders: Path) -> dict[Path, int]:
    """Every file below the folders with its size."""
    return {file: file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def refused(tightfit_says, tmp_path, monkeypatch) -> Callable[..., str]:
    """Call the command line with bad input: it must refuse as the law says. Gives back what it said on stderr."""
    spill = tmp_path / "spill"
    spill.mkdir()
    monkeypatch.setenv("TIGHTFIT_SPILL", str(spill))
    monkeypatch.chdir(spill)

    def call(*arguments: object, code: int = 1, hint: bool = True, changed: dict[Path, int] | None = None) -> str:
        expected = files_in(tmp_path) | (changed or {})
        said = tightfit_says(*arguments)
        assert said.code == code, said
        assert re.findall(r"^error: .+", said.err, re.MULTILINE) and said.err.count("error:") == 1, said.err
        assert "Traceback" not in said.err and "unexpected" not in said.err
        assert ("\n\nhint: " in said.err) == hint, said.err
        assert said.out == ""
        assert files_in(tmp_path) == expected
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("tightfit")]
        return said.err

    return call


@pytest.fixture
def model(saved, tmp_path) -> Callable[..., Path]:
    """A saved family with some of its tensors or config values changed; None takes one away."""

    def make(family: str = "llama", tensors: dict[str, Any] | None = None, config: dict[str, Any] | bytes | None = None) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        kept = load_file(saved(family) / "model.safetensors") | (tensors or {})
        save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, folder / "model.safetensors", {"format": "pt"})
        values = (
            config
            if isinstance(config, bytes)
            else json.dumps(json.loads((saved(family) / "config.json").read_text()) | (config or {})).encode()
        )
        (folder / "config.json").write_bytes(values)
        return folder

    return make


@pytest.fixture
def streaming(tmp_path) -> Callable[..., Path]:
    """A plan by hand for a model of four blocks, all but one of which stream; saved to a file."""

    def make(folder: object, **techniques: dict[str, object]) -> Path:
        stays = resident(4, 1)
        homes = tuple("ram" if position in stays else "disk" for position in range(4))
        settings = techniques | {"offload": {"streamed": [position for position in range(4) if position not in stays]}}
        workload, budget = Workload("generate", 1, 16, 4), Budget(ram=1 << 40)
        plan = Plan(str(folder), workload, budget, "exact", settings, homes, {"ram": {"weights": 10**6}}, {}, {})
        (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
        return tmp_path / "plan.json"

    return make
