"""rtn: round each weight to the nearest of evenly spaced values between the least and the greatest of its row or group.

*What shrinks*: the blocks' weights, to `bits` each and 24 bits a group.
*What it costs*: quality, much of it below 4 bits; it is what others are measured against. No text is needed. Products as with `lean`.
*How it works*: `weight ≈ scale · (code - zero)`, the range stretched to hold nought, so that nought stays nought.
*Shapes*: weight (out, in · bits / 8) int8, weight_scale (out, groups) bfloat16, weight_zero (out, groups) uint8.
*Relations*: the grid of `gptq`, without its care for the layer's inputs; `lean:grid=affine` searches the range.
*Paper*: the baseline of Frantar et al. 2023, GPTQ, section 4.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from tightfit.contracts import Quality, Stage
from tightfit.techniques._quantize import check_bits, quantize_blocks


@dataclass(frozen=True)
class RTN:
    """Round to nearest."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    quality: ClassVar[Quality] = "small"

    bits: int = 4  # 2, 3, 4 or 8 a weight; below 4 the model suffers badly
    group: int = 0  # columns that share a scale, 0 for a whole row; 128 costs 0.19 bits a weight
    where: str = ""  # regular expression on parameter paths, "" for all; what it leaves out keeps its full size

    def apply(self, model: nn.Module) -> None:
        """Replace linear layers and fused experts inside the blocks; weights that are there already are rounded at once."""
        check_bits("rtn", self.bits)
        from tightfit.formats.affine import AffineCodec  # here, since naming a technique loads no kernels

        quantize_blocks(model, "rtn", AffineCodec(self.bits, self.group), self.where)

    def needs_inputs(self) -> bool:
        """Never."""
        return False

    def needs_dense_inputs(self) -> bool:
        """Never."""
        return False

    def solve(self, weight: Tensor, hessian: Tensor, cross: Tensor | None = None) -> tuple[Tensor, ...]:
        """Nothing but rounding."""
        from tightfit.formats.affine import AffineCodec

        return AffineCodec(self.bits, self.group).encode(weight)

    def solve_bytes(self, rows: int, columns: int) -> int:
        """The weight in float32, its steps and their codes."""
        return 17 * rows * columns
