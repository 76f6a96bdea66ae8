"""Writes a Hugging Face folder of a named Llama shape with random bf16 weights, shard by shard.

python make_model.py --shape tinyllama-1.1b [--out FOLDER] [--shard-bytes N] [--seed N]   (needs torch and safetensors)

The same seed gives the same bytes, however the shards are cut. For memory and speed only: the weights mean nothing.
"""

import argparse
import json
import math
import zlib
from pathlib import Path

import torch
from peer_common import load_shape, model_folder, model_tensors, print_result, shape_names
from safetensors.torch import save_file

STD = 0.02


def plan_shards(tensors: list[tuple[str, tuple[int, ...]]], shard_bytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Cuts the tensors, in order, into shards of at most shard_bytes (a tensor larger than that gets its own)."""
    shards, filled = [[]], 0
    for name, shape in tensors:
        size = 2 * math.prod(shape)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size
    return shards


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Ones for a norm, else normal values of small spread that depend on the name and the seed alone."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, STD, generator=generator)


def write_model(config: dict, out: Path, shard_bytes: int, seed: int) -> dict:
    """Writes config, shards and index into out, and returns the index."""
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob("model*.safetensors*"):
        stale.unlink()
    shards = plan_shards(model_tensors(config), shard_bytes)
    index = {"metadata": {"total_size": 0}, "weight_map": {}}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: random_tensor(name, shape, seed) for name, shape in shard}, out / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys((name for name, _ in shard), file)
        index["metadata"]["total_size"] += sum(2 * math.prod(shape) for _, shape in shard)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, choices=shape_names())
    parser.add_argument("--out", type=Path, help="default: models/SHAPE in the user's cache folder")
    parser.add_argument("--shard-bytes", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = args.out or model_folder(args.shape)
    index = write_model(load_shape(args.shape), out, args.shard_bytes, args.seed)
    shards = len(set(index["weight_map"].values()))
    print_result({"folder": str(out), "shape": args.shape, "weight_bytes": index["metadata"]["total_size"], "shards": shards})


if __name__ == "__main__":
    main()
