"""gptq: round the columns of a layer one after the other, and let those still free make good what was lost.

*What shrinks*: the blocks' weights, to `bits` each and 24 bits a group.
*What it costs*: calibration text, and minutes a billion weights in `tightfit quantize`; a Hessian a layer, columns² · 4 bytes, and six
more while it is solved. Applied without it (`run --technique gptq`) it does no more than `rtn`. Products as with `lean`.
*How it works*: the error of a column, weighed by the inverse Hessian of the layer's inputs, goes to the columns after it, to the near
ones at once and to the others in products. Columns with the largest inputs come first. Groups lie on the columns' own order and are
fixed before the walk.
*Shapes*: as `rtn`. hessian (in, in).
*Relations*: `lean` walks the same way on better grids. The grid is `rtn`'s, so it can be exported to compressed-tensors and GPTQ files.
*Paper*: Frantar et al. 2023, GPTQ (ICLR), algorithm 1; column order, damping and true-sequential as in its released code.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from tightfit.contracts import Quality, Stage
from tightfit.techniques._quantize import check_bits, quantize_blocks
from tightfit.terms.errors import TightfitError, near

SEARCHES = ("none", "mse")


@dataclass(frozen=True)
class GPTQ:
    """Rounding with compensation."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    quality: ClassVar[Quality] = "small"

    bits: int = 4  # 2, 3, 4 or 8 a weight
    group: int = 0  # columns that share a scale, 0 for a whole row; 128 costs 0.19 bits a weight and is much better below 4 bits
    search: str = "none"  # or mse: shrink each range to the least squared error first; a few times the time
    act_order: bool = True  # columns with the largest inputs first; costs nothing when running
    damping: float = 0.01  # share of the mean diagonal that is added to the Hessian; raised tenfold where it is singular
    where: str = ""  # regular expression on parameter paths, "" for all; what it leaves out keeps its full size

    def apply(self, model: nn.Module) -> None:
        """Replace linear layers and fused experts inside the blocks; weights that are there already are rounded at once."""
        self._check()
        from tightfit.formats.affine import AffineCodec  # here, since naming a technique loads no kernels

        quantize_blocks(model, "gptq", AffineCodec(self.bits, self.group), self.where)

    def needs_inputs(self) -> bool:
        """Always."""
        return True

    def needs_dense_inputs(self) -> bool:
        """Never: errors of the layers before are left as they are."""
        return False

    def solve(self, weight: Tensor, hessian: Tensor, cross: Tensor | None = None) -> tuple[Tensor, ...]:
        """Algorithm 1 on grids that are fixed before."""
        from tightfit.formats.affine import AffineCodec
        from tightfit.formats.ranges import range_grid
        from tightfit.techniques._columns import factor, settle, walk

        codec, layer = AffineCodec(self.bits, self.group), settle(weight, hessian)
        grid = range_grid(layer.weight, self.bits, codec.groups(weight.shape[1]), searched=self.search == "mse")
        return codec.stored(grid, walk(layer, factor(layer, self.damping, self.act_order), grid))

    def solve_bytes(self, rows: int, columns: int) -> int:
        """As every walk over columns."""
        from tightfit.techniques._columns import solve_bytes

        return solve_bytes(rows, columns, fits=self.search != "none")

    def _check(self) -> None:
        check_bits("gptq", self.bits)
        if self.search not in SEARCHES:
            raise TightfitError(f"`gptq` has no search `{self.search}`", hint=near(self.search, SEARCHES))
        if not 0 < self.damping < 1:
            raise TightfitError(f"`gptq:damping` is a share between 0 and 1, not {self.damping:g}", hint="0.01 is the paper's")
