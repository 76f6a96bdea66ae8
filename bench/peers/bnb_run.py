"""Prefills and decodes with transformers and bitsandbytes on the CPU, all in memory, and prints one JSON line with speeds.

python bnb_run.py --shape tinyllama-1.1b --bits 4|8 --threads T --prompt-tokens P --tokens N [--model FOLDER]

The bf16 weights come from FOLDER (make_model.py; default: models/SHAPE in the user's cache folder) and are quantized while
loading: nf4 with bf16 arithmetic, or LLM.int8(). Where the PyPI package kernels is installed, transformers and bitsandbytes
may fetch a faster CPU kernel for nf4 from the Hugging Face hub; "kernels_package" in the result says whether it is.
"""

import argparse
import time
from importlib.util import find_spec
from pathlib import Path

from peer_common import (
    decode_figures,
    disk_read_bytes,
    greedy_decode,
    memory_now,
    model_folder,
    print_result,
    prompt_ids,
    set_threads,
    shape_names,
    versions,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, choices=shape_names())
    parser.add_argument("--bits", type=int, required=True, choices=[4, 8])
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt-tokens", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--model", type=Path)
    return parser.parse_args()


def load_model(folder: Path, bits: int):
    import torch
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    if bits == 4:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"}, quantization_config=config).eval()


def main() -> None:
    args = parse_arguments()
    set_threads(args.threads)
    start = time.perf_counter()
    model = load_model(args.model or model_folder(args.shape), args.bits)
    load_seconds = time.perf_counter() - start
    prompt = prompt_ids(args.prompt_tokens, model.config.vocab_size)
    greedy_decode(model, prompt[:2], 2)  # the first forwards set up lazy state (packed weights, thread pools)
    prefill_seconds, step_seconds, _ = greedy_decode(model, prompt, args.tokens)
    result = {
        "peer": f"bitsandbytes {'nf4' if args.bits == 4 else 'int8'}",
        "version": versions("bitsandbytes", "transformers", "torch"),
        **decode_figures(args.prompt_tokens, prefill_seconds, step_seconds),
        "load_seconds": load_seconds,
        **memory_now(),
        "disk_read_bytes": disk_read_bytes(),
        "settings": {
            "shape": args.shape,
            "bits": args.bits,
            "threads": args.threads,
            "warmed_up": True,
            "kernels_package": bool(find_spec("kernels")),
        },
    }
    print_result(result)


if __name__ == "__main__":
    main()
