"""lora: train two thin matrices beside each linear layer of the blocks, and leave the layer itself frozen.

*What shrinks*: gradients and optimizer, to those of rank · (in + out) parameters a layer, in 32 bits.
*What it costs*: two thin products a layer. Activations stay as large as in full tuning, so `recompute` and `chunked_loss` go with it.
*How it works*: `y = base(x) + alpha / rank · B A x`, A random and B zero, so that tuning starts at the base model. The base layer is
called and never asked how its weight is stored, so any will do: dense, `int8`, `nf4`, streamed. The adapters rest in 32 bits and
compute in the precision of what comes in, as under autocast: nothing of full width is copied.
*Shapes*: lora_A (rank, in), lora_B (out, rank) for each layer.
*Relations*: layers and file format are PEFT's; over `nf4` it is QLoRA. Fused experts and embeddings stay frozen, without an adapter.
It is refused beside other adapters.
*Paper*: Hu et al. 2021, LoRA, section 4.1; Dettmers et al. 2023, QLoRA.
"""

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tightfit.contracts import Beside, Quality, Stage
from tightfit.describe.blocks import blocks_of
from tightfit.formats.linear import LINEARS, QuantizedLinear
from tightfit.formats.precision import in_given_precision
from tightfit.terms.errors import TightfitError

ADAPTER = "default"
"""PEFT's name for the only adapter of a model."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters beside the linear layers of the blocks; all else is frozen."""

    stage: ClassVar[Stage] = Stage.ADAPT
    quality: ClassVar[Quality] = "exact"
    stem: ClassVar[str] = "adapter"

    rank: int = 16  # parameters and optimizer grow with it; 8 to 64 are usual
    alpha: float = 16.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # of the adapters' inputs; keeps a mask a layer for the backward pass
    where: str = ""  # regular expression on the layers' paths, "" for every linear layer of the blocks

    def apply(self, model: nn.Module) -> None:
        """Freeze the model and wrap the layers in PEFT's. On `meta` the adapters are there too; `initialise` fills them later."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import Linear

        targets = self.targets(model)
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets)
        config._register_custom_module({QuantizedLinear: Linear})  # PEFT's own way for layers that it does not know
        on_meta = all(parameter.is_meta for parameter in model.parameters())
        model.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # it asks for `in_features`, and they are there
            inject_adapter_in_model(config, model, adapter_name=ADAPTER, low_cpu_mem_usage=True)
        for layer in adapted_layers(model):
            layer.cast_input_dtype_enabled = False  # PEFT would keep a copy of every input in 32 bits; here the thin matrices follow it
            for part in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]):
                part.float().forward = partial(in_given_precision, part, part.forward)
        if not on_meta:
            self.initialise(model)

    def targets(self, model: nn.Module) -> list[str]:
        """Paths of the linear layers that get an adapter. Raises `TightfitError` where there is none."""
        if self.rank < 1:
            raise TightfitError(f"`lora:rank` is at least 1, not {self.rank}", hint="8 to 64 are usual")
        if not 0 <= self.dropout < 1:
            raise TightfitError(f"`dropout` is from 0 to below 1, not {self.dropout}", hint="0.05 and 0.1 are usual")
        refuse_second_adapter(model, "lora")
        return linear_paths(model, self.where, "lora")

    def initialise(self, model: nn.Module) -> None:
        """Give the adapters their first values where their layers lie: A as PEFT's, B zero."""
        for layer in adapted_layers(model):
            device = next(layer.base_layer.parameters()).device
            layer.lora_A.to_empty(device=device), layer.lora_B.to_empty(device=device)
            layer.reset_lora_parameters(ADAPTER, True)

    def learned_config(self, model: nn.Module) -> dict[str, Any]:
        """PEFT's `adapter_config.json`. Which base it is for, a file knows and this does not."""
        return peft_config(model, self.rank, self.alpha, self.dropout)

    def learned_state(self, model: nn.Module) -> dict[str, Tensor]:
        """A and B of each layer under PEFT's names.  # lora_A (rank, in), lora_B (out, rank), float32"""
        return peft_state(model)

    def load_learned(self, model: nn.Module, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the adapters. Raises `TightfitError`, and changes nothing, where it or rank and alpha do not fit."""
        other = [
            f"{key} {config.get(key)} in place of {own}"
            for key, own in (("r", self.rank), ("lora_alpha", self.alpha))
            if config.get(key) != own
        ]
        if other:
            raise TightfitError(f"the adapter has {' and '.join(other)}", hint="apply `lora` with the settings of the adapter")
        fill_learned(peft_state(model), state)


def adapted_layers(model: nn.Module) -> Iterator[nn.Module]:
    """PEFT's LoRA layers, in order."""
    from peft.tuners.lora import LoraLayer

    return (module for module in model.modules() if isinstance(module, LoraLayer))


def linear_paths(model: nn.Module, where: str, name: str) -> list[str]:
    """Paths of the blocks' linear layers in which `where` is found. Raises `TightfitError` in the name of the technique where none is."""
    found = [
        f"{root}.{path}"
        for root, block in blocks_of(model)
        for path, module in block.named_modules()
        if _is_linear(module) and re.search(where, f"{root}.{path}")
    ]
    if not found:
        raise TightfitError(
            f"`{name}` found no linear layer for `where={where}`",
            hint="`where` is searched in paths such as `model.layers.0.self_attn.q_proj`",
        )
    return found


def refuse_second_adapter(model: nn.Module, name: str) -> None:
    """Raise `TightfitError` where something is trained beside the model already: technique `name` would freeze or wrap that."""
    if any("base_layer" in module._modules or isinstance(module, Beside) for module in model.modules()):
        raise TightfitError(
            f"`{name}` cannot go with the adapters that this model has already", hint="one way of tuning at a time: leave the other one out"
        )


def peft_config(model: nn.Module, rank: int, alpha: float, dropout: float) -> dict[str, Any]:
    """PEFT's config of the adapters in `model`, as plain JSON values.

    `target_modules` are the last parts of the layers' paths (`q_proj`) where these name no other module, else the whole paths.
    """
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, task_type=_task_type(model), inference_mode=True)
    values = {key: value for key, value in config.to_dict().items() if not isinstance(value, set)}
    return values | {"peft_type": "LORA", "target_modules": _shortest(model)}


def peft_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by the names that PEFT's files give them. No copies."""
    from peft.tuners.lora import LoraLayer

    adapted = [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)]
    return {
        f"base_model.model.{path}.{part}.weight": layer.get_submodule(f"{part}.{ADAPTER}").weight.detach()
        for path, layer in adapted
        for part in ("lora_A", "lora_B")
    }


@torch.no_grad()
def fill_learned(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy each tensor of `state` into that of `wanted`. Raises `TightfitError`, and changes nothing, where one does not fit."""
    refuse_misfit(wanted, state)
    for key, tensor in wanted.items():
        tensor.copy_(state[key])


def refuse_misfit(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise `TightfitError` where `state` lacks a tensor of `wanted`, or has an unknown, misshapen or infinite one."""
    for what, keys in (("lacks the", wanted.keys() - state.keys()), ("has an unknown", state.keys() - wanted.keys())):
        if keys:
            more = f" and {len(keys) - 1} more" * (len(keys) > 1)
            raise TightfitError(
                f"the adapter {what} tensor `{min(keys)}`{more}", hint="was it made for another model, or for other layers?"
            )
    for key, tensor in wanted.items():
        if tensor.shape != state[key].shape:
            raise TightfitError(
                f"the adapter's `{key}` has shape {list(state[key].shape)} in place of {list(tensor.shape)}",
                hint="was it made for a model of another size, or with other settings?",
            )
        if not torch.isfinite(state[key]).all():
            raise TightfitError(f"the adapter's `{key}` holds NaN or infinite values", hint="its file is damaged, or its training diverged")


def _task_type(model: nn.Module) -> str | None:
    """PEFT's word for models that write text; for others it would expect a head that was trained too."""
    if model.get_output_embeddings() is None or "labels" not in inspect.signature(type(model).forward).parameters:
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM" if model.can_generate() else None


def _shortest(model: nn.Module) -> list[str]:
    from peft.tuners.lora import LoraLayer

    adapted = {path for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    inside = tuple(f"{path}." for path in adapted)
    leaves = {path.rpartition(".")[2] for path in adapted}
    named = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in leaves and not path.startswith(inside)}
    return sorted(leaves if named == adapted else adapted)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear) or (type(module).__module__, type(module).__name__) in LINEARS
