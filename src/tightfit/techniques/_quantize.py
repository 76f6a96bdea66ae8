"""Quantize: put a codec's layers in place of the linear layers of the blocks, and of their fused experts. What all of few bits share."""

from torch import nn

from tightfit.describe.blocks import blocks_of
from tightfit.formats.codec import Codec
from tightfit.formats.experts import swap_experts
from tightfit.formats.linear import swap_linears
from tightfit.formats.packing import BITS
from tightfit.terms.errors import TightfitError


def quantize_blocks(model: nn.Module, name: str, codec: Codec, where: str) -> None:
    """Replace linear layers and fused experts inside the blocks; weights that are there already are encoded at once.

    Raises `TightfitError` where `where` matches nothing.
    """
    blocks = blocks_of(model)
    if not swap_linears(model, blocks, codec, where) + swap_experts(blocks, codec, where):
        raise TightfitError(
            f"`{name}` found no linear layer or fused experts for `where={where}`",
            hint="`where` is searched in paths such as `model.layers.0.mlp.up_proj.weight`; quantized layers are not quantized again",
        )


def check_bits(name: str, bits: int) -> None:
    """Raise `TightfitError` for a number of bits that has no packing."""
    if bits not in BITS:
        raise TightfitError(f"`{name}:bits` cannot be {bits}", hint=f"one of {', '.join(str(width) for width in BITS)}")
