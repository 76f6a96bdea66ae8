"""Export formats: how compressed-tensors and GPTQ lay out a weight on evenly spaced values, and what their config says of it.

Codes, zeros and scales are moved, never rounded anew: what other programs decode is what tightfit decodes. Both formats pack codes as one
stream of bits, the lowest first, into 32-bit words: one along the rows of (outputs, inputs), the other along the columns of its transpose.
It knows nothing of files.

What reads them: transformers (with `compressed-tensors`; with `optimum` and `gptqmodel`), and llama.cpp's `convert_hf_to_gguf.py`, which
takes compressed-tensors in groups, not in whole rows, and GPTQ at 2, 4 and 8 bits. It would turn GPT-2's `Conv1D` matrices over once
more, which GPTQ files hold as those of `Linear`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tightfit.describe.blocks import blocks_of
from tightfit.formats.codec import row_slices
from tightfit.formats.image import TensorRecord
from tightfit.formats.linear import QuantizedLinear
from tightfit.formats.packing import unpack
from tightfit.formats.stored import StoredFormat
from tightfit.runtime.weights import read_record
from tightfit.terms.errors import TightfitError
from tightfit.terms.units import MIB

WORD = 32
"""Bits of a word, and codes that fill whole words at every width."""


@dataclass(frozen=True)
class Later:
    """A tensor that is made when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class StoredLayer:
    """A linear layer of few bits, and where its stored tensors lie: `weight = scale · (code - zero)`, which `group` columns share.

    `dtype`: of the dense weight.
    """

    path: str
    rows: int
    columns: int
    bits: int
    group: int
    dtype: torch.dtype
    codes: TensorRecord  # (rows, packed_bytes) int8
    scale: TensorRecord  # (rows, groups) bfloat16
    zero: TensorRecord  # (rows, groups) uint8

    @property
    def groups(self) -> int:
        """In a row."""
        return self.columns // self.group

    def words(self) -> Tensor:
        """The codes in words.  # (rows, ⌈columns · bits / 32⌉) int32"""
        packed = read_record(self.codes)
        out = torch.empty(self.rows, words_of(self.columns, self.bits), dtype=torch.int32)
        for start, stop in row_slices(self.rows, self.columns, 1, MIB):
            out[start:stop] = pack_words(unpack(packed[start:stop], self.columns, self.bits), self.bits)
        return out

    def zeros(self) -> Tensor:
        """# (rows, groups) uint8"""
        return read_record(self.zero)

    def scale_in(self, dtype: torch.dtype) -> Tensor:
        """Exact but for float16 below 2^-17, where it counts absolutely little.  # (rows, groups)

        Raises `TightfitError` for what float16 cannot hold.
        """
        scale = read_record(self.scale).to(dtype)
        if not scale.isfinite().all():
            raise TightfitError(
                f"a scale of `{self.path}` is too large for float16", hint="`--to compressed-tensors` keeps the model's own"
            )
        return scale


def words_of(codes: int, bits: int) -> int:
    """Words that so many codes fill."""
    return -(-codes * bits // WORD)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Code `k` of a row lies at its bits `bits · k` and after.  # (rows, columns) uint8 → (rows, ⌈columns · bits / 32⌉) int32"""
    columns = codes.shape[1]
    eights = torch.nn.functional.pad(codes, (0, -columns % WORD)).unflatten(1, (-1, 8))  # eight codes fill `bits` bytes
    stream = codes.new_zeros(*eights.shape[:2], bits)
    for k in range(8):
        byte, shift = divmod(bits * k, 8)
        stream[..., byte] |= eights[..., k] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= eights[..., k] >> (8 - shift)
    return stream.flatten(1).view(torch.int32)[:, : words_of(columns, bits)]


class ModelFormat(ABC):
    """How other programs want a quantized model. Final formats are frozen dataclasses."""

    name: ClassVar[str]
    bits: ClassVar[tuple[int, ...]]

    @abstractmethod
    def check(self, path: str, layer: QuantizedLinear) -> None:
        """Raise `TightfitError` for a layer that the format cannot hold."""

    @abstractmethod
    def fitted(self, layers: Iterable[StoredLayer]) -> Self:
        """The variant of the format that holds these layers."""

    @abstractmethod
    def tensors(self, layer: StoredLayer) -> dict[str, Later]:
        """What stands for the layer's weight, by names inside the layer."""

    @abstractmethod
    def note(self, stored: StoredFormat, model: nn.Module) -> dict[str, Any]:
        """`quantization_config`. `model` is the meta module, with its quantized layers."""


@dataclass(frozen=True)
class CompressedTensors(ModelFormat):
    """`pack-quantized` of compressed-tensors (github.com/vllm-project/compressed-tensors): weights packed by rows, zeros by columns.

    Without 3 bits: of those its versions to 0.17, and llama.cpp, read ten from a word; since 0.18 codes run on from word to word. For
    transformers 0.18 to 0.20 prepare a place of the wrong shape for packed zeros, unless it is told `dequantize=True`.
    """

    name = "compressed-tensors"
    bits = (2, 4, 8)

    def check(self, path: str, layer: QuantizedLinear) -> None:
        """It knows `Linear` alone."""
        if layer.transposed:
            raise TightfitError(f"`{path}` is a `Conv1D`, which compressed-tensors does not hold", hint="`--to gptq` does")

    def fitted(self, layers: Iterable[StoredLayer]) -> Self:
        """There is one."""
        return self

    def tensors(self, layer: StoredLayer) -> dict[str, Later]:
        """As its `PackedQuantizationCompressor` has them."""
        rows, columns, groups, bits = layer.rows, layer.columns, layer.groups, layer.bits
        return {
            "weight_packed": Later(torch.int32, (rows, words_of(columns, bits)), layer.words),
            "weight_scale": Later(layer.dtype, (rows, groups), partial(layer.scale_in, layer.dtype)),
            "weight_zero_point": Later(torch.int32, (words_of(rows, bits), groups), lambda: pack_words(layer.zeros().t(), bits).t()),
            "weight_shape": Later(torch.int64, (2,), lambda: torch.tensor([rows, columns])),
        }

    def note(self, stored: StoredFormat, model: nn.Module) -> dict[str, Any]:
        """All `Linear` but those that stayed dense."""
        sharing = {"strategy": "group", "group_size": stored.group} if stored.group else {"strategy": "channel"}
        weights = {"num_bits": stored.bits, "type": "int", "symmetric": False, "dynamic": False, **sharing}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": dense_linears(model),
        }


@dataclass(frozen=True)
class Gptq(ModelFormat):
    """The layout of AutoGPTQ and GPTQModel: (inputs, outputs), packed along the inputs, zeros along the outputs.

    Version 1 (`gptq`) stores zeros less one, and its readers do not agree on what a zero of nought becomes; version 2 (`gptq_v2`) stores
    them as they are. The first, which more programs read, is written wherever it can be.
    """

    name = "gptq"
    bits = (2, 3, 4, 8)
    version: int = 1

    def check(self, path: str, layer: QuantizedLinear) -> None:
        """Words must be full both ways."""
        for size, what in ((layer.out_features, "outputs"), (layer.in_features, "inputs")):
            if size % WORD:
                raise TightfitError(
                    f"`{path}` has {size} {what}; GPTQ files hold multiples of {WORD}", hint="`--to compressed-tensors` holds any number"
                )

    def fitted(self, layers: Iterable[StoredLayer]) -> Self:
        """Version 2 where a zero is nought: it reads all zeros, not the weights."""
        return replace(self, version=1 if all(layer.zeros().all() for layer in layers) else 2)

    def tensors(self, layer: StoredLayer) -> dict[str, Later]:
        """As GPTQModel's `BaseQuantLinear` registers them."""
        rows, columns, groups, bits = layer.rows, layer.columns, layer.groups, layer.bits
        less = 2 - self.version
        return {
            "qweight": Later(torch.int32, (words_of(columns, bits), rows), lambda: layer.words().t()),
            "qzeros": Later(torch.int32, (groups, words_of(rows, bits)), lambda: pack_words(layer.zeros().t() - less, bits)),
            "scales": Later(torch.float16, (groups, rows), lambda: layer.scale_in(torch.float16).t()),
            "g_idx": Later(torch.int32, (columns,), lambda: torch.arange(columns, dtype=torch.int32) // layer.group),
        }

    def note(self, stored: StoredFormat, model: nn.Module) -> dict[str, Any]:
        """As GPTQModel writes it; `dynamic` names what stayed dense inside the blocks, where it takes all linear layers for quantized."""
        inside = tuple(f"{path}." for path, _ in blocks_of(model))
        dense = [path for path in dense_linears(model) if path.startswith(inside)]
        return {
            "quant_method": "gptq",
            "bits": stored.bits,
            "group_size": stored.group or -1,
            "desc_act": False,
            "sym": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            **({"dynamic": {f"-:^{re.escape(path)}$": {} for path in dense}} if dense else {}),
        }


FORMATS: dict[str, ModelFormat] = {made.name: made for made in (CompressedTensors(), Gptq())}
"""By the names that people use."""


def dense_linears(model: nn.Module) -> list[str]:
    """The paths of linear layers that were not quantized."""
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
