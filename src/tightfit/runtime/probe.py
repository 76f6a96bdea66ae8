"""Probe: measure this machine once: products, memory, disk and link rates, and the bytes that no tensor shows."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tightfit import catalog
from tightfit.contracts import Stage
from tightfit.describe.source import describe
from tightfit.runtime.build import build
from tightfit.runtime.direct import DirectFiles, Readers, aligned_empty
from tightfit.runtime.spill import folder_fault
from tightfit.runtime.stream import Stream
from tightfit.terms.disk import spill_folder
from tightfit.terms.errors import TightfitError
from tightfit.terms.machine import Machine
from tightfit.terms.plan import Plan
from tightfit.terms.units import MIB
from tightfit.terms.workload import Workload

Say = Callable[[str], None]
"""Told what is measured next."""

_PROMPT = "The sea was calm that morning, and nobody on the shore could have said why."
_DISK_FILE_BYTES = 512 * MIB
_IMPORTING = """
import torch, transformers.generation, tightfit.verbs
from tightfit.runtime.process import resident
before = resident().total
import {library}
print(resident().total - before)
"""
"""Prints what a library takes beside what every run has loaded."""

_ROUTING = """
import torch
from torch.nn.functional import linear
from tightfit.runtime.process import keep_heap_tight, resident
keep_heap_tight()
draw = torch.Generator().manual_seed(0)
tokens, up, down = (torch.randn(*shape, dtype=torch.bfloat16) for shape in ((8192, 512), (16, 768, 512), (16, 512, 384)))
learning = [tensor.requires_grad_({tuned}) for tensor in (tokens, up, down)]
for rows in (8192, 1):
    hidden = linear(tokens[:rows], up[0])
    if {tuned}:
        hidden.square().sum().backward()
del hidden
before = resident().total
for _ in range(60):
    for tensor in learning:
        tensor.grad = None
    ends = torch.bincount(torch.randint(16, (8192,), generator=draw), minlength=16).cumsum(0).to(torch.int32)
    hidden = torch._grouped_mm(tokens, up.transpose(1, 2), offs=ends)[:, :384].contiguous()
    out = torch._grouped_mm(hidden, down.transpose(1, 2), offs=ends)
    if {tuned}:
        out.square().sum().backward()
    del hidden, out
for tensor in learning:
    tensor.grad = None
print(resident().total - before)
"""
"""Prints what products of ever new sizes keep, as in the experts of sixty layers, beside those of a plain model."""


def probe(say: Say = lambda line: None) -> Machine:
    """Measure and keep the result in the machine file. Takes about a minute; close other heavy programs first."""
    say("products (bfloat16)")
    machine = Machine(probed=True, device="cuda" if torch.cuda.is_available() else "cpu", flops=_flops("cpu"), version=torch.__version__)
    say("memory bandwidth")
    machine = replace(machine, memory_bandwidth=_bandwidth("cpu"), operation_seconds=_operation_seconds())
    say("disk, direct reads")
    machine = replace(machine, disk_bandwidth=disk_bandwidth(spill_folder()))
    if torch.cuda.is_available():
        say("gpu and its link")
        machine = replace(
            machine, gpu_flops=_flops("cuda"), gpu_bandwidth=_bandwidth("cuda"), link_bandwidth=_link(), overhead_gpu=_gpu_overhead()
        )
    say("quantization")
    machine = replace(machine, encode_bandwidth=_encode_bandwidth())
    say("the process's own memory")
    plain = _overhead([])
    machine = replace(
        machine,
        overhead_ram=plain,
        overhead_bitsandbytes=_library_bytes(_overhead(["nf4"]) - plain),
        overhead_peft=int(_child(["-c", _IMPORTING.format(library="peft")])),
        overhead_routing=max(0, int(_child(["-c", _ROUTING.format(tuned=False)]))),
        overhead_routing_tune=max(0, int(_child(["-c", _ROUTING.format(tuned=True)]))),
    )
    machine.save()
    return machine


def _best(work: Callable[[], object], device: str, rounds: int = 5) -> float:
    """Seconds of the fastest of some rounds: other programs only ever make it slower."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _flops(device: str) -> float:
    """Products and sums per second of a dense bfloat16 product, the shape of a prompt through one linear layer."""
    rows, width = (512, 2048) if device == "cpu" else (4096, 8192)
    left = torch.randn(rows, width, dtype=torch.bfloat16, device=device)
    right = torch.randn(width, width, dtype=torch.bfloat16, device=device)
    return 2 * rows * width * width / _best(lambda: torch.nn.functional.linear(left, right), device)


def _bandwidth(device: str) -> float:
    """Bytes of weights per second of a product with a single token, which is what decoding does."""
    width = 4096 if device == "cpu" else 16384
    token = torch.randn(1, width, dtype=torch.bfloat16, device=device)
    weights = [torch.randn(width, width, dtype=torch.bfloat16, device=device) for _ in range(4)]
    return 4 * width * width * 2 / _best(lambda: [torch.nn.functional.linear(token, weight) for weight in weights], device)


def _encode_bandwidth() -> dict[str, float]:
    """Dense bytes per second that each quantization takes in, on a model of a few linear layers: what loading takes longer with it."""
    skeleton = describe("tightfit-demo")

    def load_seconds(techniques: dict[str, dict[str, Any]]) -> float:
        plan = Plan.all_resident(skeleton.name, Workload(), len(skeleton.block_bytes()), techniques)
        seconds = []
        for _ in range(3):
            with build(plan, skeleton) as built:
                seconds.append(built.load_seconds)
        return min(seconds)

    plain = load_seconds({})
    names = [name for name, kind in catalog.techniques().items() if kind.stage == Stage.QUANTIZE]
    return {name: skeleton.weight_bytes() / max(load_seconds({name: {}}) - plain, 1e-6) for name in names}


def _operation_seconds() -> float:
    small = torch.zeros(8)
    return _best(lambda: [small + 1 for _ in range(1000)], "cpu") / 1000


def disk_bandwidth(folder: Path, size: int = _DISK_FILE_BYTES) -> float:
    """Bytes per second of cold direct reads of a fresh file in `folder`, in the pieces and threads that streaming uses.

    Raises `TightfitError` when the folder is not there, or has no room for `size` bytes.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="tightfit-", suffix=".probe") as file:
            block = os.urandom(MIB) * 8
            for _ in range(size // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return read_bandwidth(Path(file.name))
    except OSError as fault:
        raise folder_fault(folder, fault) from fault


def read_bandwidth(file: Path, limit: int = 1 << 62) -> float:
    """Bytes per second of cold direct reads of `file` from its start, up to `limit` bytes."""
    files, readers, size = DirectFiles(), Readers(Stream.READERS), min(file.stat().st_size, limit)
    buffers = [aligned_empty(Stream.PIECE_BYTES) for _ in range(Stream.READERS)]
    views = [memoryview(buffer.numpy()) for buffer in buffers]

    def read_every(first: int) -> int:
        starts = range(first * Stream.PIECE_BYTES, size, Stream.READERS * Stream.PIECE_BYTES)
        return sum(files.read(str(file), start, views[first], 0) for start in starts)

    began = time.perf_counter()
    try:
        done = sum(future.result() for future in [readers.ask(read_every, number) for number in range(Stream.READERS)])
        return done / (time.perf_counter() - began)
    finally:
        readers.close()
        files.close()


def _link() -> float:
    pinned = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(pinned, device="cuda")
    return pinned.numel() / _best(lambda: target.copy_(pinned, non_blocking=True), "cuda")


def _gpu_overhead() -> int:
    """What the card holds beside torch's own reservation, now that products ran on it."""
    free, whole = torch.cuda.mem_get_info()
    return max(0, whole - free - torch.cuda.memory_reserved())


def _overhead(techniques: list[str]) -> int:
    """The peak of a fresh `tightfit run` of the demo model, planning included, less the tensors it held. The lesser of two runs."""
    chosen = [word for name in techniques for word in ("--technique", name)]
    words = ["run", "tightfit-demo", "--prompt", _PROMPT, "--max-new-tokens", "16", "--ram", "64GiB", "--json", *chosen]
    reports = [json.loads(_child(["-m", "tightfit", *words])) for _ in range(2)]  # a first run may still compile Python files
    return min(max(report["process"]["load_peak"], report["process"]["run_peak"]) - report["measured_peak_bytes"] for report in reports)


def _library_bytes(difference: int) -> int:
    """What bitsandbytes adds to a run: the `difference` of two runs, unless the one without it had loaded it too."""
    return difference if difference >= MIB else int(_child(["-c", _IMPORTING.format(library="bitsandbytes")]))


def _child(words: list[str]) -> str:
    """What a fresh Python says, which knows nothing of an earlier probe: its file may be damaged, and that is why one probes again."""
    with tempfile.TemporaryDirectory(prefix="tightfit-") as home:
        answer = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, check=False, env=os.environ | {"TIGHTFIT_HOME": home}
        )
    if answer.returncode:
        first = (answer.stderr.strip().splitlines() or ["no message"])[0]
        raise TightfitError(
            f"the probe's trial run failed: {first}", hint="`tightfit run tightfit-demo` is the same run; mend what it complains of"
        )
    return answer.stdout
