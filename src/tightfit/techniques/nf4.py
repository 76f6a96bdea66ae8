"""nf4: four bits per weight, on the quantiles of a normal distribution, in the linear layers and fused experts of the blocks.

*What shrinks*: the blocks' weights, to 4.13 bits each (4.25 packed): about a quarter of 16-bit weights.
*What it costs*: an error of up to 15 % of the largest of 64 neighbours. On a CPU with AVX512-BF16 the packed layout multiplies one
token several times faster than dense bfloat16 weights, and many a fifth slower; it computes few tokens in bfloat16, whatever their
dtype. Standard weights are decoded for every product: half as long again at one token, a tenth longer at many.
*How it works*: blocks of 64 weights share a scale; with double quantization the scales rest in 8 bits. Rows are decoded slice by
slice, so the workspace stays within a few MiB. Gradients flow through to the input; the weights are frozen. Embeddings, the head,
norms and routers stay dense.
*Shapes*: weight (out, in / 2) int8 with two codes a byte; standard: weight_absmax (out · in / 64,), weight_nested_absmax,
weight_nested_code, weight_offset; packed: weight_absmax (in / 64, out) bfloat16. Experts have their number before each.
*Relations*: the frozen base of QLoRA, stored as bitsandbytes stores it; unlike bitsandbytes it takes fused experts too.
*Paper*: Dettmers et al. 2023, QLoRA, section 3.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from tightfit.contracts import Quality, Stage
from tightfit.techniques._quantize import quantize_blocks
from tightfit.terms.errors import TightfitError, near

LAYOUTS = ("auto", "standard", "packed")


@dataclass(frozen=True)
class NF4:
    """Four bits per weight, one scale per 64 weights."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    quality: ClassVar[Quality] = "near"

    where: str = ""  # regular expression on parameter paths, "" for all; what it leaves out keeps its full size
    double_quantization: bool = True  # scales in 8 bits: 0.37 bits per weight less, products a little slower; standard layout only
    layout: str = "auto"  # packed: fast on CPUs with AVX512-BF16, 0.12 bits more, slow elsewhere; standard: GPUs, tuning; auto: by machine

    def apply(self, model: nn.Module) -> None:
        """Replace linear layers and fused experts inside the blocks; weights that are there already are encoded at once."""
        if self.layout not in LAYOUTS:
            raise TightfitError(f"`nf4` has no layout `{self.layout}`", hint=near(self.layout, LAYOUTS))
        from tightfit.formats.nf4 import NF4Codec  # here, since bitsandbytes takes 40 MiB

        quantize_blocks(model, "nf4", NF4Codec(_layout(self.layout), self.double_quantization), self.where)

    def settled(self, device: str) -> "NF4":
        """The layout that is fast on `device`."""
        return replace(self, layout=_layout(self.layout, device))


def _layout(asked: str, device: str = "") -> str:
    """`auto` is `packed` where this machine has no GPU and its CPU has the fused kernel. A plan for elsewhere names the layout."""
    if asked != "auto":
        return asked
    if device == "cuda" or (not device and torch.cuda.is_available()):
        return "standard"
    from tightfit.formats.nf4 import has_packed_kernel  # here, since bitsandbytes takes 40 MiB

    return "packed" if has_packed_kernel() else "standard"
