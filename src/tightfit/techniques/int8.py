"""int8: eight bits per weight in the linear layers and fused experts of the repeated blocks.

*What shrinks*: the blocks' weights, to 8 bits each and 16 more per output row: half of 16-bit weights.
*What it costs*: a rounding error of at most half a step, a 254th of the largest weight in its row. One token against bfloat16 weights
on a CPU is faster than dense, since less memory is read; many tokens pay for decoding, some percent.
*How it works*: symmetric, one scale per output row, no calibration. Activations stay as they are (weight-only). Few tokens go through
torch's int8 kernel; otherwise rows are decoded slice by slice and multiplied, so the workspace stays within a few MiB. Gradients
flow through to the input; the weights are frozen. Embeddings, the head, norms and routers stay dense.
*Shapes*: weight (out, in) int8, weight_scale (out,) bfloat16; experts have their number before both.
*Relations*: BMInf's grid, without its 8-bit activations; `nf4` takes half the bytes and is coarser.
*Paper*: Han et al. 2022, BMInf (ACL demo), quantization of linear layers.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from tightfit.contracts import Quality, Stage
from tightfit.formats.int8 import Int8Codec
from tightfit.techniques._quantize import quantize_blocks


@dataclass(frozen=True)
class Int8:
    """Eight bits per weight, one scale per output row."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    quality: ClassVar[Quality] = "near"

    where: str = ""  # regular expression on parameter paths, "" for all; what it leaves out keeps its full size

    def apply(self, model: nn.Module) -> None:
        """Replace linear layers and fused experts inside the blocks; weights that are there already are encoded at once."""
        quantize_blocks(model, "int8", Int8Codec(), self.where)
