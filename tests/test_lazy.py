"""Laziness: what must start at once imports nothing heavy."""

import os
import subprocess
import sys
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"
HEAVY = {"torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "numpy"}


def imported_by(*arguments: str) -> set[str]:
    """The names of all modules that `python ARGUMENTS` imports, as the interpreter itself lists them."""
    path = os.pathsep.join(filter(None, [str(SRC), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def test_import_tightfit_loads_nothing_heavy() -> None:
    modules = imported_by("-c", "import tightfit")
    assert "tightfit" in modules
    assert modules & HEAVY == set()


def test_help_loads_nothing_heavy() -> None:
    modules = imported_by("-m", "tightfit", "--help")
    assert "tightfit.cli" in modules
    assert modules & HEAVY == set()


def test_a_heavy_import_would_be_seen() -> None:
    assert "numpy" in imported_by("-c", "import tightfit, numpy")
