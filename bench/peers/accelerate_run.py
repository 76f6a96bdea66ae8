"""Decodes with transformers and accelerate's disk offload, and prints one JSON line with per-token times.

python accelerate_run.py --model FOLDER --tokens N --threads T --ram-bytes B --offload-folder DIR
                         [--prompt-tokens P] [--cpu-weights-bytes W] [--resident copied|mapped] [--bnb-4bit]

FOLDER holds config.json and bf16 safetensors (make_model.py). device_map="auto" with max_memory={"cpu": W} fills the cpu with
the first modules and leaves the rest on disk; the default W is B less what Python and the libraries hold, less the largest
tensor (torch makes a reordered copy of it for the multiplication), less a reserve; accelerate keeps room for the largest
module beyond that. The script sets no limit: start it inside cgroup.py.

transformers reads safetensors through mmap and copies neither the "cpu" weights nor the "disk" ones: both are page cache that
the kernel may drop, so W does not bound the memory and under a limit the "cpu" weights are read again for every token
("mapped", the library as it is). "copied", the default, moves the "cpu" weights into ordinary memory after loading: what the
device map promises, and faster under a limit.

With --bnb-4bit everything must fit on the cpu, and what glibc keeps of freed buffers may double the memory: start it with
MALLOC_MMAP_THRESHOLD_=65536 in the environment to have that given back.
"""

import argparse
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

from peer_common import decode_figures, disk_read_bytes, greedy_decode, memory_now, print_result, prompt_ids, set_threads, versions

RESERVE_BYTES = 64 * 2**20  # activations, KV cache of a short run, allocator slack


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--ram-bytes", type=int, required=True)
    parser.add_argument("--offload-folder", type=Path, required=True)
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--cpu-weights-bytes", type=int)
    parser.add_argument("--resident", choices=["copied", "mapped"], default="copied")
    parser.add_argument("--bnb-4bit", action="store_true", help="nf4 weights; bitsandbytes allows no module on disk then")
    return parser.parse_args()


def load_model(args: argparse.Namespace, cpu_weights_bytes: int):
    import torch
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    options = {"dtype": torch.bfloat16, "device_map": "auto", "max_memory": {"cpu": cpu_weights_bytes}}
    if args.bnb_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = LlamaForCausalLM.from_pretrained(args.model, offload_folder=str(args.offload_folder), **options)
    if args.resident == "copied":
        for parameter in model.parameters():
            if parameter.device.type != "meta" and parameter.is_floating_point():  # quantized ones are copies already
                parameter.data = parameter.data.clone()
    return model.eval()


def placed_bytes(model) -> int:
    """Bytes of the weights that sit on the cpu (a weight on disk is a meta tensor between its uses)."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type != "meta")


def default_cpu_weights_bytes(folder: Path, ram_bytes: int, held_bytes: int) -> int:
    """What of ram_bytes may hold weights for good beside the held_bytes and the working memory of a forward."""
    from safetensors import safe_open

    largest = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            sizes = [2 * math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()]  # noqa: SIM118
        largest = max(largest, *sizes)
    return max(0, ram_bytes - held_bytes - largest - RESERVE_BYTES)


def run(args: argparse.Namespace) -> dict:
    """Loads, decodes and returns the measured fields."""
    from transformers import LlamaForCausalLM  # noqa: F401 - first, so that held memory counts it

    before = memory_now()["anonymous_bytes"]
    cpu_weights_bytes = args.cpu_weights_bytes
    if cpu_weights_bytes is None:
        cpu_weights_bytes = default_cpu_weights_bytes(args.model, args.ram_bytes, before)
    start = time.perf_counter()
    model = load_model(args, cpu_weights_bytes)
    load_seconds = time.perf_counter() - start
    prompt = prompt_ids(args.prompt_tokens, model.config.vocab_size)
    prefill_seconds, step_seconds, _ = greedy_decode(model, prompt, args.tokens)
    return {
        **decode_figures(args.prompt_tokens, prefill_seconds, step_seconds),
        "load_seconds": load_seconds,
        **memory_now(),
        "disk_read_bytes": disk_read_bytes(),
        "anonymous_bytes_before_load": before,
        "cpu_weights_bytes_asked": cpu_weights_bytes,
        "cpu_weights_bytes_placed": placed_bytes(model),
        "device_map": dict(Counter(str(device) for device in getattr(model, "hf_device_map", {"": "cpu"}).values())),
        "on_disk": [name for name, device in getattr(model, "hf_device_map", {}).items() if device == "disk"],
    }


def main() -> int:
    args = parse_arguments()
    set_threads(args.threads)
    peer = "accelerate disk offload" + (" with bitsandbytes nf4" if args.bnb_4bit else "")
    packages = ["transformers", "accelerate", "safetensors", "torch", *(["bitsandbytes"] if args.bnb_4bit else [])]
    settings = {
        "model": args.model.name,
        "threads": args.threads,
        "ram_bytes": args.ram_bytes,
        "resident": args.resident,
        "malloc_mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_"),
        "dtype": "nf4" if args.bnb_4bit else "bfloat16",
    }
    result = {"peer": peer, "version": versions(*packages), "settings": settings}
    try:
        result |= run(args)
    except ValueError as error:
        print_result({**result, "error": str(error)})
        return 1
    print_result(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
