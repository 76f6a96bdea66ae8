"""kernels: seconds of a product with few-bit weights on a CPU, in the same process as bitsandbytes', dense ones and plain reading.

python bench/kernels/run.py [--rounds N] [--result FILE]      (about three minutes and 6 GiB)

The sides take turns, a round each; ratios are medians of the rounds' ratios. Every call takes the next of many copies of its matrix. Wall
seconds and those of the CPU are told: where they differ, others were running.
"""

import argparse
import json
import statistics
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bitsandbytes
import torch
from record import machine_facts, say, write_result
from torch import Tensor

from tightfit.formats.codec import SLICE_BYTES, row_slices
from tightfit.formats.kernels.cpu import affine_product, has_kernel, table_decode, table_product
from tightfit.formats.nf4 import NF4Codec
from tightfit.formats.packing import packed_bytes

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "cpu.json"

Call = Callable[[int], object]
"""A product with the copy of that number."""


@dataclass(frozen=True)
class Side:
    """One way to multiply: its name, the stored bytes that a call reads, and the call."""

    name: str
    stored_bytes: int
    call: Call
    dtype: str = "bfloat16"
    bits: int = 16


def copies_of(tensor: Tensor, count: int) -> Tensor:
    """(count, *shape), each written by itself."""
    return tensor.expand(count, *tensor.shape).clone()


def matrices(settings: dict[str, Any]) -> dict[str, Any]:
    """Random codes and grids, many copies each: at every speed the same, whatever they hold."""
    rows, columns, count = settings["rows"], settings["columns"], settings["copies"]
    stored: dict[str, Any] = {}
    for bits in settings["bits"]:
        stored[f"packed-{bits}"] = copies_of(torch.randint(-128, 128, (rows, packed_bytes(columns, bits)), dtype=torch.int8), count)
        stored[f"table-{bits}"] = copies_of(torch.randn(rows, 2**bits).bfloat16(), count)
        groups = (rows, columns // settings["group"])
        stored[f"scale-{bits}"] = copies_of(torch.rand(groups).bfloat16(), count)
        stored[f"zero-{bits}"] = copies_of(torch.randint(0, 2**bits, groups, dtype=torch.uint8), count)
    dense = torch.randn(rows, columns).bfloat16()
    stored["nf4-packed"] = [copies_of(part, count) for part in NF4Codec("packed").encode(dense)]
    quantized, state = bitsandbytes.functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")
    stored["nf4-standard"] = copies_of(quantized, count), state
    stored["dense"] = copies_of(dense, count)
    return stored


def taking_turns(product: Callable[..., Tensor], x: Tensor, *stored: Tensor) -> Call:
    """`product` with `x` and the copy of a number."""
    return lambda i: product(x, *(part[i] for part in stored))


def our_sides(settings: dict[str, Any], stored: dict[str, Any], tokens: int, bits: int) -> list[Side]:
    """Tables and affine grids by the kernel, in both dtypes."""
    sides = []
    for dtype in (torch.bfloat16, torch.float32):
        x, name = torch.randn(tokens, settings["columns"]).to(dtype), str(dtype).removeprefix("torch.")
        packed, table, scale, zero = (stored[f"{part}-{bits}"] for part in ("packed", "table", "scale", "zero"))
        table_bytes, affine_bytes = packed[0].nbytes + table[0].nbytes, packed[0].nbytes + scale[0].nbytes + zero[0].nbytes
        sides.append(Side(f"table-{bits}-{name}", table_bytes, taking_turns(table_product, x, packed, table), name, bits))
        sides.append(Side(f"affine-{bits}-{name}", affine_bytes, taking_turns(affine_product, x, packed, scale, zero), name, bits))
    return sides


def their_sides(settings: dict[str, Any], stored: dict[str, Any], tokens: int) -> list[Side]:
    """bitsandbytes by its packed kernel and as its `Linear4bit` does by itself, and torch's dense product."""
    x, shape = torch.randn(tokens, settings["columns"]).bfloat16(), (settings["rows"], settings["columns"])
    codes, absmax = stored["nf4-packed"]
    quantized, state = stored["nf4-standard"]
    dense = stored["dense"]
    codec = NF4Codec("packed")
    return [
        Side("nf4-packed", codes[0].nbytes + absmax[0].nbytes, lambda i: codec.kernel_product(x, (codes[i], absmax[i]), shape), bits=4),
        Side("nf4-standard", quantized[0].nbytes, lambda i: bitsandbytes.matmul_4bit(x, quantized[i].t(), quant_state=state), bits=4),
        Side("dense", dense[0].nbytes, lambda i: torch.mm(x, dense[i].t())),
    ]


def read_sides(settings: dict[str, Any], stored: dict[str, Any]) -> list[Side]:
    """Plain reading of as many bytes as the codes take: the sum of all as 64-bit integers."""
    sides = []
    for bits in settings["bits"]:
        packed = stored[f"packed-{bits}"].view(torch.int64)
        sides.append(Side(f"read-{bits}", packed[0].nbytes, lambda i, packed=packed: packed[i].sum(), "", bits))
    return sides


def sliced_side(settings: dict[str, Any], stored: dict[str, Any], tokens: int, bits: int, dtype: torch.dtype) -> Side:
    """Rows decoded and multiplied, a slice at a time: what long prompts take."""
    rows, columns = settings["rows"], settings["columns"]
    x, name = torch.randn(tokens, columns).to(dtype), str(dtype).removeprefix("torch.")
    packed, table = stored[f"packed-{bits}"], stored[f"table-{bits}"]
    slices = row_slices(rows, columns * dtype.itemsize, 1, SLICE_BYTES["cpu"])

    def call(i: int) -> Tensor:
        result = x.new_empty(tokens, rows)
        for start, stop in slices:
            dense = table_decode(packed[i, start:stop], table[i, start:stop], columns, dtype)
            torch.mm(x, dense.t(), out=result[:, start:stop])
        return result

    return Side(f"sliced-{bits}-{name}", packed[0].nbytes + table[0].nbytes, call, name, bits)


def take_turns(sides: list[Side], rounds: int, calls: int, copies: int) -> dict[str, list[tuple[float, float]]]:
    """For every side and round, wall and CPU seconds of one call. A round that is not counted goes before.

    A turn is a few calls only, so that most turns are not interrupted where others run too.
    """
    seconds: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
    for turn in range(rounds + 1):
        for side in sides:
            began, busy = time.perf_counter(), time.thread_time()
            for call in range(turn * calls, (turn + 1) * calls):
                side.call(call % copies)
            took = (time.perf_counter() - began) / calls, (time.thread_time() - busy) / calls
            if turn:
                seconds[side.name].append(took)
    return seconds


def rows_of(sides: list[Side], seconds: dict[str, list[tuple[float, float]]], against: list[str], tokens: int) -> list[dict[str, Any]]:
    """Medians of each side, and of its rounds' ratios to those `against` which it is held."""
    found = []
    for side in sides:
        mine = seconds[side.name]
        row: dict[str, Any] = {"name": side.name, "tokens": tokens, "dtype": side.dtype, "bits": side.bits, "bytes": side.stored_bytes}
        row["seconds"], row["cpu_seconds"] = (statistics.median(column) for column in zip(*mine, strict=True))
        for name in against:
            pairs = list(zip(mine, seconds[name], strict=True))
            row[f"times {name}"] = statistics.median(wall / other for (wall, _), (other, _) in pairs)
            row[f"cpu times {name}"] = statistics.median(busy / other for (_, busy), (_, other) in pairs)
        found.append(row)
        say(f"{tokens:4} {side.name:22} {1e3 * row['seconds']:8.3f} ms" + "".join(f"  {row[f'times {n}']:.2f} x {n}" for n in against))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    settings = tomllib.loads((HERE / "settings.toml").read_text())
    rounds = args.rounds or settings["rounds"]
    facts = machine_facts(settings["threads"])
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    stored = matrices(settings)
    result = {"question": "kernels", "machine": facts, "settings": settings | {"rounds": rounds}, "has_kernel": has_kernel(), "rows": []}
    with torch.inference_mode():
        sides = read_sides(settings, stored) + their_sides(settings, stored, 1)
        sides += [side for bits in settings["bits"] for side in our_sides(settings, stored, 1, bits)]
        seconds = take_turns(sides, rounds, settings["calls"], settings["copies"])
        result["rows"] += rows_of(sides, seconds, ["nf4-packed", *(f"read-{bits}" for bits in settings["bits"])], 1)
        first = settings["bits"][0]
        for tokens in settings["many"]:
            sides = [*their_sides(settings, stored, tokens), *our_sides(settings, stored, tokens, first)]
            sides += [sliced_side(settings, stored, tokens, first, dtype) for dtype in (torch.bfloat16, torch.float32)]
            seconds = take_turns(sides, max(rounds // 6, 3), settings["many_calls"], settings["copies"])
            result["rows"] += rows_of(sides, seconds, ["dense"], tokens)
    ours = next(row for row in result["rows"] if row["name"] == f"table-{first}-bfloat16")
    result["kept"] = {name: ours[f"times {name}"] <= most for name, most in settings["bars"].items()}
    write_result(args.result, result)
    print(json.dumps({"kept": result["kept"], "rows": {f"{row['name']} x {row['tokens']}": row["seconds"] for row in result["rows"]}}))


if __name__ == "__main__":
    main()
