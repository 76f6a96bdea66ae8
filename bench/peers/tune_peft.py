"""Tunes with plain PyTorch, PEFT and bitsandbytes, all in memory, and prints one JSON line with peaks and seconds per step.

python tune_peft.py --model FOLDER --way lora|qlora [--prepared] [--checkpointing] --batch B --tokens T --threads N
                    [--steps S] [--warm-up W] [--rank R] [--device cpu|cuda] [--records]

lora: dense bf16 base. qlora: nf4 with double quantization and bf16 arithmetic. Adapters are float32, on every linear layer of the
blocks, under fused AdamW. Without --prepared this is the leanest that PEFT allows: only what must be is in float32. With it, the
model went through prepare_model_for_kbit_training and computes under bf16 autocast, as transformers' Trainer(bf16=True) runs it.

With --records the steps run under the allocator's records, which gives the bytes of tensors at the peak and makes seconds
worthless. The process's memory and seconds come from a run without. Start it with MALLOC_MMAP_THRESHOLD_=262144 and
MALLOC_TRIM_THRESHOLD_=262144 in the environment to have glibc give freed buffers back at once.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_common import memory_now, print_result, set_threads, versions


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--way", choices=["lora", "qlora"], required=True)
    parser.add_argument("--prepared", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--records", action="store_true")
    return parser.parse_args()


def load_model(args: argparse.Namespace) -> Any:
    """The base model, in bf16 or in four bits; random where the folder has a config only."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": 0 if args.device == "cuda" else "cpu"}}
    if args.way == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
    if any(args.model.glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(args.model, **options)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model), dtype=torch.bfloat16)
    return _quantized(model, options["quantization_config"], args.device) if args.way == "qlora" else model


def _quantized(model: Any, config: Any, device: str) -> Any:
    """As transformers loads it, for a model that was never saved."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    for path, linear in list(model.named_modules()):
        if type(linear) is torch.nn.Linear and linear is not model.get_output_embeddings():
            parent, _, name = path.rpartition(".")
            new = Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16, quant_type="nf4", device="meta"
            )
            new.weight, new.bias = Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4", module=new), linear.bias
            linear.weight = None
            model.get_submodule(parent).__setattr__(name, new.to(device))
    model.is_loaded_in_4bit, model.quantization_method = True, "bitsandbytes"
    return model


def adapt(model: Any, args: argparse.Namespace) -> Any:
    """PEFT's model around the base."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if args.prepared:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    return get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")).train()


def stepper(model: Any, args: argparse.Namespace) -> Callable[[], float]:
    """A function that takes one step and gives the loss."""
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    shape = (args.batch, args.tokens)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(args.device)
    precision = torch.autocast(args.device, torch.bfloat16) if args.prepared else contextlib.nullcontext()

    def step() -> float:
        with precision:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def run(args: argparse.Namespace, began_running: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Load, adapt, and take the steps."""
    import torch

    start = time.perf_counter()
    step = stepper(adapt(load_model(args), args), args)
    load = {"load_seconds": time.perf_counter() - start, "load_peak_rss_bytes": memory_now()["peak_rss_bytes"]}
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak begins anew
    if args.device == "cuda":
        load["load_peak_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    began_running()
    losses, seconds = [], []
    for _ in range(args.warm_up + args.steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    timed = seconds[args.warm_up :]
    card = {"measured_peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    return {
        **load,
        "seconds_per_step": statistics.median(timed) if timed else None,
        "step_seconds": timed,
        "losses": losses,
        **memory_now(),
        **(card if args.device == "cuda" else {}),
    }


def recorded(args: argparse.Namespace) -> dict[str, Any]:
    """The bytes of tensors at the peaks of loading and of the steps, by the CPU allocator's own records."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fits_as_promised"))
    from witness import mark_run, witness

    return witness(lambda: run(args, mark_run))


def main() -> None:
    args = parse_arguments()
    set_threads(args.threads)
    warnings.filterwarnings("ignore")
    import bitsandbytes  # noqa: F401 - both first, so that the memory before counts them
    import peft  # noqa: F401
    import transformers  # noqa: F401

    before = memory_now()
    found = recorded(args) if args.records else run(args)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    settings["malloc_mmap_threshold"] = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    print_result(
        {
            "peer": f"PEFT {args.way}",
            "version": versions("peft", "bitsandbytes", "transformers", "torch"),
            **found,
            "rss_bytes_before": before["anonymous_bytes"] + before["file_backed_bytes"],
            "settings": settings,
        }
    )


if __name__ == "__main__":
    main()
