"""Solving: the bytes of a quantization that goes block by block, before a weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tightfit.contracts import Solves
from tightfit.describe.blocks import blocks_of
from tightfit.describe.skeleton import Skeleton
from tightfit.formats.experts import QuantizedExperts, matrices_in
from tightfit.formats.linear import QuantizedLinear
from tightfit.planner.weigh import ENCODING, tensor_bytes
from tightfit.rehearse.rehearsal import rehearse
from tightfit.terms.budget import Budget
from tightfit.terms.errors import DoesNotFit
from tightfit.terms.footprint import total
from tightfit.terms.machine import Machine
from tightfit.terms.quantizing import TOKENS_PER_COLUMN, QuantizePlan
from tightfit.terms.units import show_bytes
from tightfit.terms.workload import Workload

ROUTING_BYTES = 128
"""Of a token, while fused experts are solved: up to 32 choices, and which of them are one expert's."""


@dataclass(frozen=True)
class Calibration:
    """Texts that a model reads so that its layers' inputs are known."""

    samples: int
    tokens: int
    rows: int  # at a time


def plan_solving(
    skeleton: Skeleton, name: str, settings: Mapping[str, Any], technique: Solves, text: Calibration, budget: Budget, machine: Machine
) -> QuantizePlan:
    """Predict the peak of `runtime/quantize.py`, with the hidden states in RAM where they fit and on the disk where they do not.

    Raises `DoesNotFit` when neither stays inside the budget, and `TightfitError` for several GPUs.
    """
    budget.refuse_several("quantizing", "name one GPU, such as `--gpu 24GiB`: one block after the other is solved there")
    dense, small = skeleton.meta_model(), skeleton.meta_model()
    technique.apply(small)  # type: ignore[attr-defined]
    layers = {path: module for path, module in small.named_modules() if isinstance(module, QuantizedLinear | QuantizedExperts)}
    blocks = [sum(tensor_bytes(tensor) for tensor in _tensors(block)) for _, block in blocks_of(dense)]
    written = sum(tensor_bytes(tensor) for tensor in _tensors(small))
    outside = sum(tensor_bytes(tensor) for tensor in _tensors(dense)) - sum(blocks)
    shrunk = [sum(tensor_bytes(tensor) for tensor in _tensors(block)) for _, block in blocks_of(small)]
    mixed = [layer for layer in layers.values() if isinstance(layer, QuantizedExperts)] if technique.needs_inputs() else []
    states = _states_bytes(text, skeleton, mixed) * (2 if technique.needs_dense_inputs() else 1)
    columns = max((layer.shape[1] for layer in layers.values() if isinstance(layer, QuantizedLinear)), default=0)
    parts = {
        "weights": outside + max(one + other for one, other in zip(blocks, shrunk, strict=True)),
        "activations": _reading_bytes(technique, skeleton, text, columns, bool(mixed)) if technique.needs_inputs() else 0,
        "workspace": max(_solving_bytes(technique, module) for module in layers.values()),
    }
    tier = budget.compute_tier
    beside = {**parts, "activations": parts["activations"] + (states if tier == "ram" else 0)}  # behind a GPU they rest in RAM too
    found = [({**held, "overhead": machine.overhead(tier, total(held))}, home) for held, home in ((beside, "ram"), (parts, "disk"))]
    room = tier == "ram" or states + machine.overhead("ram", states) <= budget.ram
    fitting = [(held, home) for held, home in found if total(held) <= budget.bytes_of(tier) and (room or home == "disk")]
    if not fitting:
        _refuse(skeleton.name, name, found[-1][0], budget)
    predicted, home = fitting[0]
    on_disk = written + (states if home == "disk" else 0)
    if on_disk > budget.disk:
        raise DoesNotFit(
            f"`{skeleton.name}` quantized with `{name}` writes {show_bytes(on_disk)}; the budget on disk is {show_bytes(budget.disk)}",
            hint="a larger `--disk`, fewer bits or fewer samples",
        )
    matrices, quantized = sum(map(matrices_in, layers.values())), sum(_weights(module) for module in layers.values())
    return QuantizePlan(
        skeleton.name, name, settings, text.samples, text.tokens, text.rows, matrices, quantized, home, budget, predicted, written,
        8 * sum(_stored(module) for module in layers.values()) / quantized, _notes(technique, text, columns),
    )  # fmt: skip


def _notes(technique: Solves, text: Calibration, columns: int) -> tuple[str, ...]:
    """Where the text is too short for all that the technique would do."""
    tokens = text.samples * text.tokens
    if not technique.needs_dense_inputs() or tokens >= TOKENS_PER_COLUMN * columns:
        return ()
    return (f"{tokens} tokens do not suffice to aim layers of {columns} columns at the dense model; {TOKENS_PER_COLUMN * columns} would",)


def _tensors(module: nn.Module) -> list[Any]:
    return [*module.parameters(), *module.buffers()]


def _weights(module: nn.Module) -> int:
    """Weights of a layer as it was."""
    if isinstance(module, QuantizedExperts):
        return module.num_experts * sum(rows * columns for rows, columns in module.shapes.values())
    assert isinstance(module, QuantizedLinear)
    return module.shape[0] * module.shape[1]


def _stored(module: nn.Module) -> int:
    assert isinstance(module, QuantizedExperts | QuantizedLinear)
    return sum(tensor_bytes(tensor) for tensor in module.stored)


def _states_bytes(text: Calibration, skeleton: Skeleton, mixed: list[QuantizedExperts]) -> int:
    """At a block's door, and at that of its fused experts."""
    inner = max((layer.shapes[layer.matrices[0]][1] for layer in mixed), default=0)
    return text.samples * text.tokens * (skeleton.config.get_text_config(decoder=True).hidden_size + inner) * skeleton.dtype.itemsize


def _reading_bytes(technique: Solves, skeleton: Skeleton, text: Calibration, columns: int, mixed: bool) -> int:
    """Of a pass through the blocks, whose logits nobody needs, and what is noted of the inputs on the way."""
    choices = text.samples * text.tokens * ROUTING_BYTES if mixed else 0
    aside = 4 * text.rows * text.tokens * columns if technique.needs_dense_inputs() else 0  # a layer's inputs, while the dense block runs

    def inner() -> nn.Module:
        return skeleton.meta_model().base_model  # type: ignore[return-value]

    peak = rehearse(inner, Workload("embed", text.rows, text.tokens)).peak
    return total(peak) - peak.get("weights", 0) + choices + aside


def _solving_bytes(technique: Solves, module: nn.Module) -> int:
    """Beside a dense layer, while its codes are found."""
    if isinstance(module, QuantizedExperts) and technique.needs_inputs():
        return max(technique.solve_bytes(*shape) for shape in module.shapes.values())
    if isinstance(module, QuantizedExperts):
        return int(ENCODING * max(rows * columns for rows, columns in module.shapes.values()) * module.dtype.itemsize)
    assert isinstance(module, QuantizedLinear)
    return technique.solve_bytes(*module.shape)


def _refuse(model: str, name: str, parts: Mapping[str, int], budget: Budget) -> None:
    tier, needed = budget.compute_tier, total(parts)
    raise DoesNotFit(
        f"`{model}` quantized with `{name}` needs {show_bytes(needed)} on {tier}; the budget is {show_bytes(budget.bytes_of(tier))}",
        hint="fewer tokens a sample (`--context`) need less; `--technique rtn` needs no text",
        details="  " + "   ".join(f"{kind} {show_bytes(size)}" for kind, size in parts.items() if size),
    )
