"""Solving: the bytes of a quantization that goes block by block, before a weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tightfit.contracts import Solves
from tightfit.describe.blocks import blocks_of
from tightfit.describe.skeleton import Skeleton
from tightfit.formats.experts import QuantizedExperts
from tightfit.formats.linear import QuantizedLinear
from tightfit.planner.weigh import ENCODING, tensor_bytes
from tightfit.rehearse.rehearsal import rehearse
from tightfit.terms.budget import Budget
from tightfit.terms.errors import DoesNotFit
from tightfit.terms.footprint import total
from tightfit.terms.machine import Machine
from tightfit.terms.quantizing import QuantizePlan
from tightfit.terms.units import show_bytes
from tightfit.terms.workload import Workload


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

    Raises `DoesNotFit` when neither stays inside the budget.
    """
    dense, small = skeleton.meta_model(), skeleton.meta_model()
    technique.apply(small)  # type: ignore[attr-defined]
    layers = {path: module for path, module in small.named_modules() if isinstance(module, QuantizedLinear | QuantizedExperts)}
    blocks = [sum(tensor_bytes(tensor) for tensor in _tensors(block)) for _, block in blocks_of(dense)]
    written = sum(tensor_bytes(tensor) for tensor in _tensors(small))
    outside = sum(tensor_bytes(tensor) for tensor in _tensors(dense)) - sum(blocks)
    shrunk = [sum(tensor_bytes(tensor) for tensor in _tensors(block)) for _, block in blocks_of(small)]
    states = _states_bytes(text, skeleton) * (2 if technique.needs_dense_inputs() else 1)
    parts = {
        "weights": outside + max(one + other for one, other in zip(blocks, shrunk, strict=True)),
        "activations": _activations(skeleton, text) if technique.needs_inputs() else 0,
        "workspace": max(_solving_bytes(technique, module) for module in layers.values()),
    }
    tier = budget.compute_tier
    homes = [({**parts, "activations": parts["activations"] + states}, "ram"), (parts, "disk")]
    found = [({**held, "overhead": machine.overhead(tier, total(held))}, home) for held, home in homes]
    fitting = [(held, home) for held, home in found if total(held) <= budget.bytes_of(tier)]
    if not fitting:
        _refuse(skeleton.name, name, found[-1][0], budget)
    predicted, home = fitting[0]
    on_disk = written + (states if home == "disk" else 0)
    if on_disk > budget.disk:
        raise DoesNotFit(
            f"`{skeleton.name}` quantized with `{name}` writes {show_bytes(on_disk)}; the budget on disk is {show_bytes(budget.disk)}",
            hint="a larger `--disk`, fewer bits or fewer samples",
        )
    quantized = sum(_weights(module) for module in layers.values())
    return QuantizePlan(
        skeleton.name, name, settings, text.samples, text.tokens, text.rows, len(layers), quantized, home, budget, predicted, written,
        8 * sum(_stored(module) for module in layers.values()) / quantized,
    )  # fmt: skip


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


def _states_bytes(text: Calibration, skeleton: Skeleton) -> int:
    return text.samples * text.tokens * skeleton.config.get_text_config(decoder=True).hidden_size * skeleton.dtype.itemsize


def _activations(skeleton: Skeleton, text: Calibration) -> int:
    """Of a pass through the blocks, whose logits nobody needs."""

    def inner() -> nn.Module:
        return skeleton.meta_model().base_model  # type: ignore[return-value]

    peak = rehearse(inner, Workload("embed", text.rows, text.tokens)).peak
    return total(peak) - peak.get("weights", 0)


def _solving_bytes(technique: Solves, module: nn.Module) -> int:
    """Beside a dense layer, while its codes are found."""
    if isinstance(module, QuantizedExperts):
        rows, columns = max(module.shapes.values(), key=lambda shape: shape[0] * shape[1])
        return int(ENCODING * rows * columns * module.dtype.itemsize)
    assert isinstance(module, QuantizedLinear)
    return technique.solve_bytes(*module.shape)


def _refuse(model: str, name: str, parts: Mapping[str, int], budget: Budget) -> None:
    tier, needed = budget.compute_tier, total(parts)
    raise DoesNotFit(
        f"`{model}` quantized with `{name}` needs {show_bytes(needed)} on {tier}; the budget is {show_bytes(budget.bytes_of(tier))}",
        hint="fewer tokens a sample (`--context`) need less; `--technique rtn` needs no text",
        details="  " + "   ".join(f"{kind} {show_bytes(size)}" for kind, size in parts.items() if size),
    )
