"""Decodes with llama.cpp under whatever memory cgroup this was started in, and prints one JSON line with per-token times.

python llama_cpp_run.py --model FILE.gguf --tokens N --threads T [--prompt-tokens P] [--load-mode mmap] [--repack]
                        [--build FOLDER]   (build_llama_cpp.sh makes the build; default folder: the user's cache)

Plain mmap and no weight repacking by default: repacked weights (on x86: Q4_0, some K types) are anonymous memory beside the
mapped file, which cannot be reclaimed under a limit. The KV cache is f16 and just as long as the run needs.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from peer_common import cache_folder, decode_figures, print_result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--load-mode", choices=["mmap", "none", "mlock", "mmap+mlock", "dio"], default="mmap")
    parser.add_argument("--repack", action="store_true")
    parser.add_argument("--build", type=Path, default=cache_folder() / "llama.cpp")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    if not (args.build / "version.json").exists():
        print_result({"peer": "llama.cpp", "error": f"no build in {args.build}: run build_llama_cpp.sh first"})
        return 1
    version = json.loads((args.build / "version.json").read_text())
    numbers = [args.tokens, args.threads, args.prompt_tokens]
    command = [args.build / "bin" / "llama_decode_times", args.model, *numbers, args.load_mode, int(args.repack)]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        print_result({"peer": "llama.cpp", "version": version, "error": f"llama_decode_times ended with {done.returncode}"})
        return 1
    measured = json.loads(done.stdout.splitlines()[-1])
    settings = {
        "model": args.model.name,
        "model_bytes": args.model.stat().st_size,
        "threads": args.threads,
        "load_mode": args.load_mode,
        "repack": args.repack,
        "kv_cache": "f16",
        "system_info": measured.pop("system_info"),
    }
    figures = decode_figures(args.prompt_tokens, measured.pop("prefill_seconds"), measured.pop("token_seconds"))
    print_result({"peer": "llama.cpp", "version": version, **figures, **measured, "settings": settings})
    return 0


if __name__ == "__main__":
    sys.exit(main())
