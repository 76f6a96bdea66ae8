"""PEFT on paper: PEFT and bitsandbytes' own modules on a model that has no weights, so that QLoRA as they run it can be rehearsed.

Made for benchmarks alone. What `MatMul4Bit`'s kernel allocates inside itself is not seen, which errs in the peer's favour.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tightfit.contracts import Quality, Stage
from tightfit.describe.blocks import blocks_of
from tightfit.formats.nf4 import BLOCK, NESTED_BLOCK
from tightfit.techniques.lora import adapted_layers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes
    from bitsandbytes.functional import QuantState


class PaperLinear4bit(bitsandbytes.nn.Linear4bit):
    """bitsandbytes' layer with its quantization state in buffers, which a rehearsal can turn into fake tensors."""

    def __init__(self, dense: nn.Linear) -> None:
        shape, dtype = (dense.out_features, dense.in_features), dense.weight.dtype
        with torch.device("meta"):
            super().__init__(dense.in_features, dense.out_features, dense.bias is not None, dtype, quant_type="nf4", device="meta")
            if dense.bias is not None:
                self.bias = nn.Parameter(torch.empty(dense.out_features, dtype=dtype), requires_grad=False)
            blocks = -(-shape[0] * shape[1] // BLOCK)
            for name, size, kind in (
                ("absmax", blocks, torch.uint8),
                ("nested_absmax", -(-blocks // NESTED_BLOCK), torch.float32),
                ("nested_code", 256, torch.float32),
                ("code", 16, torch.float32),
                ("offset", 1, torch.float32),
            ):
                self.register_buffer(name, torch.empty(size, dtype=kind))
        self.dense_shape, self.dense_dtype = shape, dtype

    def encode(self) -> None:
        """Let the weight be codes; after PEFT has asked the dense one for its kind."""
        codes = torch.empty((self.weight.numel() + 1) // 2, 1, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """As `Linear4bit.forward` while training.  # (…, in) → (…, out)"""
        given, x = x.dtype, x.to(self.compute_dtype)
        nested = QuantState(self.nested_absmax, code=self.nested_code, blocksize=NESTED_BLOCK, dtype=torch.float32)
        state = QuantState(
            self.absmax, self.dense_shape, self.code, BLOCK, "nf4", self.dense_dtype, offset=self.offset.view(()), state2=nested
        )
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return bitsandbytes.matmul_4bit(x, self.weight, bias=bias, quant_state=state).to(given)


def _in_mixed_precision(forward: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return forward(*args, **kwargs)


@dataclass(frozen=True)
class PeftQLoRA:
    """QLoRA as PEFT and bitsandbytes run it.

    `prepared`: after `prepare_model_for_kbit_training`, with autocast, as `Trainer(bf16=True)` runs it; else the leanest that PEFT allows.
    """

    stage: ClassVar[Stage] = Stage.ADAPT
    quality: ClassVar[Quality] = "near"

    prepared: bool = True
    checkpointing: bool = False
    rank: int = 16

    def apply(self, model: Any) -> None:
        """Quantize and adapt the blocks' linear layers of a `meta` model."""
        from peft import LoraConfig, inject_adapter_in_model, prepare_model_for_kbit_training

        layers, targets = [], []
        for root, block in blocks_of(model):
            for path, linear in list(block.named_modules()):
                if type(linear) is nn.Linear:
                    parent, _, name = path.rpartition(".")
                    layers.append(PaperLinear4bit(linear))
                    setattr(block.get_submodule(parent), name, layers[-1])
                    targets.append(f"{root}.{path}")
        model.is_loaded_in_4bit = True
        model.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.prepared:
                prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            if self.checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            inject_adapter_in_model(LoraConfig(r=self.rank, target_modules=targets), model, low_cpu_mem_usage=True)
        for layer in adapted_layers(model):
            layer.lora_A.float(), layer.lora_B.float()
        for layer in layers:
            layer.encode()
        if self.prepared:
            model.forward = partial(_in_mixed_precision, model.forward)
