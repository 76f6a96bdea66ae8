"""Record: what every benchmark result carries (machine, versions, load, plan digest), how it is written, and how children run.

Imported by the questions' drivers; it knows no question.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
CHECKOUT = BENCH.parent
PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "safetensors")


def cache_folder() -> Path:
    """Where models, builds and the probed machine file of the benchmarks lie, unless a driver is told another place."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tightfit-bench"


def _field(file: str, name: str) -> str:
    """The value behind `name` in a file of `name : value` lines; empty where there is none."""
    lines = Path(file).read_text().splitlines() if Path(file).exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def machine_facts(threads: int) -> dict[str, Any]:
    """The machine as it is now, at the start of a job: take it before the job makes its own load."""
    from tightfit import __version__

    memory = _field("/proc/meminfo", "MemTotal")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "ram_bytes": int(memory.split()[0]) * 1024 if memory else 0,
        "kernel": platform.release(),
        "load_average": list(os.getloadavg()),
        "versions": {"python": platform.python_version(), "tightfit": __version__, **{name: _installed(name) for name in PACKAGES}},
    }


def plan_digest(plan: Mapping[str, Any]) -> str:
    """SHA-256 of a plan's JSON with sorted keys: equal digests, equal plans."""
    return hashlib.sha256(json.dumps(plan, sort_keys=True, default=list).encode()).hexdigest()


def write_result(file: Path, values: Mapping[str, Any]) -> None:
    """Write a result under a temporary name, then rename it, so that an interrupted job leaves the last whole one.

    Folders of this machine are told by their names only.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(_without_places(json.loads(json.dumps(values, default=str))), indent=1) + "\n")
    partial.replace(file)


def _without_places(value: Any) -> Any:
    """`value` with the last part of each text that is a whole path."""
    if isinstance(value, dict):
        return {name: _without_places(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def read_result(file: Path) -> dict[str, Any]:
    """A result that was written before; empty where there is none."""
    return json.loads(file.read_text()) if file.exists() else {}


def child_environment(threads: int, **more: str) -> dict[str, str]:
    """The environment of every child: this checkout, that many threads, offline, and the benchmarks' own machine file."""
    return os.environ | {
        "PYTHONPATH": str(CHECKOUT / "src"),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TIGHTFIT_HOME": str(home_of(threads)),
        **more,
    }


def home_of(threads: int) -> Path:
    """Where the machine file lies that was probed with so many threads: threads take memory, and set the rates."""
    return cache_folder() / f"home-{threads}"


def ensure_probed(threads: int) -> dict[str, Any]:
    """The benchmarks' machine file, made by `tightfit probe` where there is none yet."""
    file = home_of(threads) / "machine.json"
    if not file.exists():
        say("probing the machine once")
        command = [sys.executable, "-m", "tightfit", "probe", "--json"]
        subprocess.run(command, env=child_environment(threads), stdout=subprocess.DEVNULL, check=True)
    return json.loads(file.read_text())


def last_json(text: str) -> dict[str, Any] | None:
    """The JSON object on the last line that is not blank, or None."""
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def run_child(command: list[str], threads: int, timeout: float, **more: str) -> dict[str, Any]:
    """Run `command` and give its last JSON line; `error` tells why there is none."""
    try:
        done = subprocess.run(command, env=child_environment(threads, **more), capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:.0f} s"}
    found = last_json(done.stdout)
    if found is None:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"ended with {done.returncode}: {last}"}
    return found


def say(line: str) -> None:
    """Progress, on stderr: stdout is for results."""
    print(line, file=sys.stderr, flush=True)
