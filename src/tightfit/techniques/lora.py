"""lora: train two thin matrices beside each linear layer of the blocks, and leave the layer itself frozen.

*What shrinks*: gradients and optimizer, to those of rank · (in + out) parameters a layer, in 32 bits.
*What it costs*: two thin products a layer. Activations stay as large as in full tuning, so `recompute` and `chunked_loss` go with it.
*How it works*: `y = base(x) + alpha / rank · B A x`, A random and B zero, so that tuning starts at the base model. The base layer is
called and never asked how its weight is stored, so any will do: dense, `int8`, `nf4`, streamed.
*Shapes*: lora_A (rank, in), lora_B (out, rank) for each layer.
*Relations*: layers and file format are PEFT's; over `nf4` it is QLoRA. Fused experts and embeddings stay frozen, without an adapter.
*Paper*: Hu et al. 2021, LoRA, section 4.1; Dettmers et al. 2023, QLoRA.
"""

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from tightfit.contracts import Quality, Stage
from tightfit.describe.blocks import blocks_of
from tightfit.formats.linear import LINEARS, QuantizedLinear
from tightfit.terms.errors import TightfitError

ADAPTER = "default"
"""PEFT's name for the only adapter of a model."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters beside the linear layers of the blocks; all else is frozen."""

    stage: ClassVar[Stage] = Stage.ADAPT
    quality: ClassVar[Quality] = "exact"

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
            layer.lora_A.float(), layer.lora_B.float()
        if not on_meta:
            self.initialise(model)

    def targets(self, model: nn.Module) -> list[str]:
        """Paths of the linear layers that get an adapter. Raises `TightfitError` where there is none."""
        if self.rank < 1:
            raise TightfitError(f"`lora:rank` is at least 1, not {self.rank}", hint="8 to 64 are usual")
        found = [
            f"{root}.{path}"
            for root, block in blocks_of(model)
            for path, module in block.named_modules()
            if _is_linear(module) and re.search(self.where, f"{root}.{path}")
        ]
        if not found:
            raise TightfitError(
                f"`lora` found no linear layer for `where={self.where}`",
                hint="`where` is searched in paths such as `model.layers.0.self_attn.q_proj`",
            )
        return found

    def initialise(self, model: nn.Module) -> None:
        """Give the adapters their first values where their layers lie: A as PEFT's, B zero."""
        for layer in adapted_layers(model):
            device = next(layer.base_layer.parameters()).device
            layer.lora_A.to_empty(device=device), layer.lora_B.to_empty(device=device)
            layer.reset_lora_parameters(ADAPTER, True)


def adapted_layers(model: nn.Module) -> Iterator[nn.Module]:
    """PEFT's LoRA layers, in order."""
    from peft.tuners.lora import LoraLayer

    return (module for module in model.modules() if isinstance(module, LoraLayer))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear) or (type(module).__module__, type(module).__name__) in LINEARS
