"""Build hook: compiles `formats/kernels/table.c` into the wheel, or into the checkout (`pip install -e .`, `python hatch_build.py`).

Without a C compiler it goes on without, in one line; the library then takes its portable path. `CC` names another compiler.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # by hand, outside a build
    BuildHookInterface = object

KERNELS = Path("src/tightfit/formats/kernels")
SOURCE = KERNELS / "table.c"
LIBRARY = KERNELS / "_table.so"
FLAGS = ("-std=c11", "-O2", "-shared", "-fPIC", "-Wl,--build-id=none")


def compile_kernels(root: Path) -> str:
    """Compile under a temporary name, then rename, so that no process loads half a library. Returns why there is none, or nothing."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        compiler = ["cc"]
    if shutil.which(compiler[0]) is None:
        return "no C compiler"
    partial = root / LIBRARY.with_name(f"_table.{os.getpid()}.partial")
    command = [*compiler[:1], *FLAGS, "-o", str(partial), str(root / SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        partial.unlink(missing_ok=True)
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return next((line for line in lines if "error" in line), lines[-1])
    partial.replace(root / LIBRARY)
    return ""


def build(root: Path) -> bool:
    """Compile, and say in one line how it went. Whether there is a library."""
    fault = compile_kernels(root)
    print(f"tightfit: built without CPU kernels ({fault})" if fault else f"tightfit: built {LIBRARY}", file=sys.stderr)
    return not fault


class KernelHook(BuildHookInterface):
    """Puts the compiled library into a wheel, which then belongs to this platform but to every Python 3."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if not build(Path(self.root)):
            return
        build_data["pure_python"] = False
        build_data["artifacts"].append(str(LIBRARY))
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


if __name__ == "__main__":
    sys.exit(not build(Path(__file__).resolve().parent))
