"""Tunes with Soup's layer streaming from disk, on the CPU, and prints one JSON line with seconds per step.

python tune_soup.py --model FOLDER --soup VENV --folder SCRATCH --batch B --tokens T --threads N
                    [--steps S] [--warm-up W] [--rank R] [--quantization none|4bit]

VENV is a virtual environment of its own: python -m venv VENV && VENV/bin/pip install torch==2.13.0 "soup-cli[train]==0.77.0".
Soup 0.77 streams on a CPU and says itself that this is "a test convenience": it computes in float32 there, so its store of the
blocks is twice the checkpoint, and embeddings and head stay in memory in float32. It has no clock for single steps: a step is the
time between two lines of its log of batches. It needs a tokenizer; where the folder has none, the demo model's stands in, whose
ids are all inside a larger vocabulary. SCRATCH takes its store; the script sets no limit: start it inside cgroup.py.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from peer_common import print_result

DEMO = Path(__file__).resolve().parents[2] / "src" / "tightfit" / "presets" / "tightfit-demo"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
POLL_SECONDS = 0.02


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--soup", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quantization", choices=["none", "4bit"], default="none")
    return parser.parse_args()


def link_or_copy(file: Path, place: Path) -> None:
    """Soup takes no symbolic links; a copy only where the file lies on another disk."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def write_job(args: argparse.Namespace) -> Path:
    """The base with a tokenizer, samples of at least so many tokens, and Soup's settings."""
    base = args.folder.resolve() / "base"
    base.mkdir(parents=True)
    for file in args.model.resolve().iterdir():
        link_or_copy(file, base / file.name)
    for name in TOKENIZER:
        if not (base / name).exists():
            (base / name).write_bytes((DEMO / name).read_bytes())
    sample = {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "the cat and the dog " * args.tokens}]}
    count = args.batch * (args.warm_up + args.steps + 1)  # a step ends where the next begins
    (args.folder / "data.jsonl").write_text("".join(f"{json.dumps(sample | {'id': number})}\n" for number in range(count)))
    data = {"train": str(args.folder.resolve() / "data.jsonl"), "format": "chatml", "chat_template": "chatml"}
    settings = {
        "base": str(base),
        "task": "sft",
        "data": data | {"max_length": args.tokens, "val_split": 0.0},
        "training": {
            "epochs": 1,
            "lr": 1e-4,
            "batch_size": args.batch,
            "gradient_accumulation_steps": 1,
            "quantization": args.quantization,
            "stream_layers": True,
            "stream_source": "disk",
            "lora": {"r": args.rank, "alpha": 16, "target_modules": "all-linear"},
        },
        "output": str(args.folder.resolve() / "out"),
    }
    file = args.folder / "soup.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    return file


def batches_begun(folder: Path) -> int:
    """How many batches its log names so far."""
    log = folder / "out" / "rewind.jsonl"
    return log.read_text().count('"kind": "batch"') if log.exists() else 0


def peak_of(process: int, before: int) -> int:
    """The highest resident memory that the process reports so far."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return before
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), before)


def run(args: argparse.Namespace) -> dict:
    """Start Soup, and watch when each batch begins."""
    command = [str(args.soup / "bin" / "python"), "-m", "soup_cli", "--no-telemetry", "--no-audit-log", "train", "--yes"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HOME": str(args.folder.resolve()), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    moments, peak, start, job = [], 0, time.perf_counter(), write_job(args)
    with (args.folder / "soup.log").open("w+") as log:
        process = subprocess.Popen([*command, "--config", str(job)], env=environment, cwd=args.folder, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            moments += [time.perf_counter()] * (batches_begun(args.folder) - len(moments))
            peak = peak_of(process.pid, peak)
            time.sleep(POLL_SECONDS)
        log.seek(0)
        said = log.read()
    seconds = [later - earlier for earlier, later in pairwise(moments)][args.warm_up :]
    if process.returncode or not seconds:
        lines = [line for line in said.splitlines() if "rror" in line] or said.splitlines() or ["no message"]
        return {"error": f"ended with {process.returncode}: {lines[-1].strip()}"}
    return {
        "seconds_per_step": statistics.median(seconds),
        "step_seconds": seconds,
        "load_seconds": moments[0] - start,
        "peak_rss_bytes": peak,
    }


def main() -> int:
    args = parse_arguments()
    asked = "import importlib.metadata as m; print(m.version('soup-cli'), m.version('torch'))"
    soup, torch = subprocess.run([args.soup / "bin" / "python", "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    result = {"peer": "Soup", "version": {"soup-cli": soup, "torch": torch}, "settings": settings} | run(args)
    print_result(result)
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main())
