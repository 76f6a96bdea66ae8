"""Law 7, Ctrl-C: a run that is broken off leaves one clear line, no file and no thread."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tightfit import verbs
from tightfit.runtime.generate import Sampling
from tightfit.terms.budget import Budget
from tightfit.terms.machine import Machine
from tightfit.terms.units import GIB, MIB
from tightfit.terms.workload import Workload

SRC = Path(__file__).parents[2] / "src"
ROOMY = Machine(probed=True, overhead_ram=8 * GIB, overhead_bitsandbytes=0, allocator_slack=0.0)
"""As if Python took 8 GiB, so that a real process never does; what the budget leaves beside it is for tensors."""
TIGHT = 8 * GIB + 11 * MIB
"""Little more than half of the demo model beside them, so that it streams."""


def test_an_interrupted_run_ends_its_threads():
    plan = verbs.plan("tightfit-demo", Workload(tokens=16, new_tokens=200), Budget(ram=TIGHT, disk=GIB), random_weights=True, machine=ROOMY)
    assert "offload" in plan.techniques
    told = []

    def interrupt(piece: str) -> None:
        told.append(sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("tightfit")))
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        verbs.run(plan, "The sea was calm", Sampling(), interrupt)
    assert told and len(told[0]) == 2, "it was streaming when it was interrupted"
    assert threading.active_count() == before


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_in_the_middle_of_a_streamed_run(tmp_path, monkeypatch):
    """A true process that streams from its spill file and is interrupted once its first words are out."""
    home, spill = tmp_path / "home", tmp_path / "spill"
    spill.mkdir()
    monkeypatch.setenv("TIGHTFIT_HOME", str(home))
    ROOMY.save()
    before = sorted(tmp_path.rglob("*"))
    words = [
        "run",
        "tightfit-demo",
        "--random-weights",
        "--ram",
        str(TIGHT),
        "--disk",
        "1GiB",
        "--max-new-tokens",
        "900",
        "--prompt",
        "The sea",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "tightfit", *words, "--save-report", str(tmp_path / "report.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(SRC), "TIGHTFIT_SPILL": str(spill)},
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's background jobs ignore it
    )
    try:
        assert process.stdout is not None
        first = process.stdout.read(len("The sea") + 1)
        assert first.startswith(b"The sea"), process.communicate()[1].decode()
        assert any("(deleted)" in os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir()), "its spill file is open"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    said = err.decode()
    assert "disk" in said and said.rstrip().endswith("interrupted; nothing was left behind")
    assert said.count("interrupted") == 1 and "Traceback" not in said and "error:" not in said
    assert sorted(tmp_path.rglob("*")) == before
