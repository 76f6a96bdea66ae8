"""gpu: predicted against measured peak on one GPU, tokens per second against the floor and against accelerate's offload.

python bench/gpu/run.py [--out FOLDER] [--wheels FOLDER] [--only TEXT] [--seconds S] [--dry]     (at most ten minutes)

Writes one JSON for each job into FOLDER (default: results/ here), each as soon as it is done; what is another question's into a folder of
its name there (default: its own results/). Offline: `--wheels` names a folder of wheels that the machine lacks, such as bitsandbytes'.
`--dry` runs every job on the CPU with a tiny shape and keeps nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import BENCH, CHECKOUT, machine_facts, read_result, run_child, say, write_result

HERE = Path(__file__).resolve().parent
OUT = HERE / "results"


def install_wheels(wheels: Path, target: str) -> None:
    """Put the wheels into a folder of their own; nothing is fetched."""
    files = [str(path) for path in sorted(wheels.glob("*.whl"))]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target, *files]
    subprocess.run(command, check=True)


def job_of(name: str, settings: dict[str, Any], dry: bool) -> dict[str, Any]:
    """The job with all that it needs to know."""
    shared = {key: settings[key] for key in ("prompt_tokens", "new_tokens", "ram", "warm_up", "steps")}
    job = {"name": name, "side": "probe", "quality": "exact", "techniques": [], "dry": dry} | shared | settings["jobs"][name]
    return job | settings["dry"] if dry else job


def command_of(job: dict[str, Any], packages: str, out: Path) -> list[str]:
    """The command of a job. PEFT's is its own script, on a folder that has the preset's config only; a question's its own driver."""
    if job["side"] == "question":
        results = BENCH / job["question"] / "results" if out == OUT else out / job["question"]
        device = ["--dry"] if job["dry"] else ["--device", "cuda", "--results", str(results)]
        only = ["--only", "block"] if job["dry"] else job["arguments"]
        return [sys.executable, str(BENCH / job["question"] / "run.py"), *device, *only]
    if job["side"] != "PEFT":
        return [sys.executable, str(HERE / "one.py"), json.dumps(job)]
    presets = CHECKOUT / "src" / "tightfit" / "presets"
    folder = Path(packages) / f"shape-{job['model']}"
    folder.mkdir(exist_ok=True)
    file = presets / f"{job['model']}.json"
    (folder / "config.json").write_bytes((file if file.exists() else presets / job["model"] / "config.json").read_bytes())
    names = {"--batch": "batch", "--tokens": "tokens", "--threads": "threads", "--steps": "steps", "--warm-up": "warm_up"}
    numbers = [text for flag, name in names.items() for text in (flag, str(job[name]))]
    script = [str(BENCH / "peers" / "tune_peft.py"), "--model", str(folder), "--device", "cpu" if job["dry"] else "cuda"]
    return [sys.executable, *script, *job["arguments"], *numbers]


def pace_of(job: dict[str, Any]) -> str:
    """The figure that a job must have given."""
    return "seconds_per_step" if job["side"] in ("tune", "PEFT") else "seconds_per_token"


def run_job(job: dict[str, Any], seconds: float, packages: str, out: Path) -> dict[str, Any]:
    """One job in its own process, for at most `seconds`."""
    environment = {
        "TIGHTFIT_HOME": str(Path(packages) / "home"),
        "PYTHONPATH": f"{CHECKOUT / 'src'}:{packages}",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",
    }
    began = time.monotonic()
    found = run_child(command_of(job, packages, out), job["threads"], seconds, **environment)
    return found | {"wall_seconds": round(time.monotonic() - began, 1)}


def line_of(name: str, found: dict[str, Any]) -> str:
    """What a person wants to see while it runs."""
    if "seconds_per_step" in found:
        return f"{name}: {found['seconds_per_step']:.3f} s per step, {found.get('measured_peak_bytes', 0) / 2**30:.2f} GiB at the peak"
    if "seconds_per_token" not in found:
        return f"{name}: {found.get('error', 'done')} ({found['wall_seconds']} s)"
    promise = (
        f", {found['deviation']:+.1%} off the measured bytes, {found['over_floor']:.2f} times the floor" if "deviation" in found else ""
    )
    return f"{name}: {found['seconds_per_token']:.3f} s per token{promise} ({found['wall_seconds']} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--only", default="", help="jobs whose name holds this text (and the probe)")
    parser.add_argument("--seconds", type=float, help="when the whole must be over")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    settings = tomllib.loads((HERE / "settings.toml").read_text())
    ends = time.monotonic() + (args.seconds or settings["seconds"])
    facts = machine_facts(args.threads)
    with tempfile.TemporaryDirectory(prefix="tightfit-gpu-") as packages:
        if args.wheels:
            install_wheels(args.wheels, packages)
        for name in settings["jobs"]:
            if name != "probe" and args.only not in name:
                continue
            job = job_of(name, settings, args.dry) | {"threads": args.threads}
            seconds = min(job["limit_seconds"], ends - time.monotonic() - 5)
            found = run_job(job, seconds, packages, args.out) if seconds > 20 else {"error": "no time was left", "wall_seconds": 0}
            if name == "probe":
                facts["probed"] = found
            elif job["side"] != "question" and not args.dry:  # a question writes its own
                before = read_result(args.out / f"{name}.json")
                if pace_of(job) in found or pace_of(job) not in before.get("result", {}):
                    write_result(
                        args.out / f"{name}.json", {"question": "gpu", "name": name, "machine": facts, "settings": job, "result": found}
                    )
            say(line_of(name, found))
            if args.dry:
                print(json.dumps({name: found}))


if __name__ == "__main__":
    main()
