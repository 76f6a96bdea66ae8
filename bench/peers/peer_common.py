"""What the peer scripts share: shapes, folders, /proc figures and the JSON line that each prints last; imported, not run."""

import json
import os
import statistics
import time
from importlib import metadata
from pathlib import Path

SHAPES_FILE = Path(__file__).with_name("shapes.json")


def cache_folder() -> Path:
    """The folder that builds and made models go to unless a script is told another."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tightfit-bench"


def model_folder(shape: str) -> Path:
    return cache_folder() / "models" / shape


def shape_names() -> list[str]:
    return list(json.loads(SHAPES_FILE.read_text()))


def load_shape(name: str) -> dict:
    """The Hugging Face config fields of one named shape."""
    return json.loads(SHAPES_FILE.read_text())[name]


def layer_tensors(config: dict) -> list[tuple[str, tuple[int, ...]]]:
    """Name (inside the layer) and shape of each tensor of one Llama layer, in the Hugging Face order."""
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return [
        ("input_layernorm.weight", (hidden,)),
        ("self_attn.q_proj.weight", (queries, hidden)),
        ("self_attn.k_proj.weight", (keys, hidden)),
        ("self_attn.v_proj.weight", (keys, hidden)),
        ("self_attn.o_proj.weight", (hidden, queries)),
        ("post_attention_layernorm.weight", (hidden,)),
        ("mlp.gate_proj.weight", (ffn, hidden)),
        ("mlp.up_proj.weight", (ffn, hidden)),
        ("mlp.down_proj.weight", (hidden, ffn)),
    ]


def model_tensors(config: dict) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of an untied Llama model, in the order in which they are used."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    tensors = [("model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(config["num_hidden_layers"]):
        tensors += [(f"model.layers.{layer}.{name}", shape) for name, shape in layer_tensors(config)]
    return [*tensors, ("model.norm.weight", (hidden,)), ("lm_head.weight", (vocab, hidden))]


def _proc_number(file: str, key: str) -> int:
    for line in Path(file).read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0])
    raise KeyError(f"no {key} in {file}")


def memory_now() -> dict[str, int]:
    """This process's peak, anonymous and file-backed resident memory in bytes (ru_maxrss would carry the parent's peak)."""
    keys = {"peak_rss_bytes": "VmHWM", "anonymous_bytes": "RssAnon", "file_backed_bytes": "RssFile"}
    return {name: _proc_number("/proc/self/status", key) * 1024 for name, key in keys.items()}


def disk_read_bytes() -> int:
    """Bytes that this process has made the kernel fetch from storage, page faults of mapped files included."""
    return _proc_number("/proc/self/io", "read_bytes")


def prompt_ids(count: int, vocab: int) -> list[int]:
    """A fixed prompt of dummy token ids, the same as in llama_decode_times.cpp."""
    return [300 + (i * 7919) % (vocab - 300) for i in range(count)]


def greedy_decode(model, prompt: list[int], tokens: int) -> tuple[float, list[float], list[int]]:
    """Seconds of the prefill, seconds of each of the tokens - 1 decode steps after it, and the token ids chosen."""
    import torch

    start = time.perf_counter()
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        chosen = [int(out.logits[0, -1].argmax())]
        prefill_seconds = time.perf_counter() - start
        step_seconds = []
        for _ in range(tokens - 1):
            start = time.perf_counter()
            out = model(input_ids=torch.tensor([chosen[-1:]]), past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            chosen.append(int(out.logits[0, -1].argmax()))
            step_seconds.append(time.perf_counter() - start)
    return prefill_seconds, step_seconds, chosen


def set_threads(threads: int) -> None:
    """Must come before the first import of torch in the process."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def decode_figures(prompt_tokens: int, prefill_seconds: float, step_seconds: list[float]) -> dict:
    """The timing fields that every peer's result has."""
    median = statistics.median(step_seconds) if step_seconds else None
    return {
        "seconds_per_token": median,
        "decode_tokens_per_second": 1 / median if median else None,
        "prefill_seconds": prefill_seconds,
        "prefill_tokens_per_second": prompt_tokens / prefill_seconds,
        "prompt_tokens": prompt_tokens,
        "tokens": len(step_seconds) + 1,
        "token_seconds": step_seconds,
    }


def print_result(result: dict) -> None:
    print(json.dumps(result), flush=True)


def versions(*packages: str) -> dict[str, str]:
    return {package: metadata.version(package) for package in packages}
