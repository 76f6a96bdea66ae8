"""lean: round a layer's weights on values that are learned for each row from what an error there costs, and let later columns make good.

*What shrinks*: the blocks' weights, to `bits` each and a table of 2^bits · 16 bits a row: 4.06, 3.03 or 2.02 bits at 4,096 columns.
*What it costs*: calibration text, and minutes a billion weights in `tightfit quantize`; memory as `gptq`, and the samples' hidden states
twice. Applied without it (`run --technique lean`) rows get the tables that fit their weights best, and nothing is made good. Running, few
tokens are multiplied straight from the codes, many are decoded slice by slice.
*How it works*: `gptq`'s walk over the columns, on values that weighted k-means found in each row before it: a weight's importance is the
inverse Hessian's diagonal to the power -p, so that values lie where rounding would cost most. A row whose few large inputs drew all
values to them (a massive activation) does far better on values that count all weights the same: each row takes what came out better.
A layer aims at what it gave in the dense model, half-way: what is rounded are the least squares of that, from the inputs that the
layers before it spoiled; where there are fewer than 4 tokens a column, it does not. After the walk `rounds` times: the best table for
the codes, in closed form, then one descent over the codes. Neither can raise the layer's output error, inputs damped.
*Shapes*: weight (out, in · bits / 8) int8, weight_table (out, 2^bits) bfloat16; with `grid=affine` as `rtn`. hessian (in, in).
*Relations*: `grid=affine` finds evenly spaced values by a search over ranges, which other programs can load; `gptq` is the same without
learned values. LoRA and QST tune on top.
*Paper*: Zhang and Shrivastava 2025, LeanQuant (ICLR), section 4; the conditional diagonal as in its released code. The choice of
each row and the turns after the walk are not in it. Li et al. 2025, GPTAQ, and Arai and Ichikawa 2025, quantization error propagation,
aim at the dense model's output.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tightfit.contracts import Quality, Stage
from tightfit.techniques._quantize import check_bits, quantize_blocks
from tightfit.terms.errors import TightfitError, near

GRIDS = ("table", "affine")
WEIGHTINGS = ("conditional", "plain")


@dataclass(frozen=True)
class Lean:
    """Learned values, compensated rounding."""

    stage: ClassVar[Stage] = Stage.QUANTIZE
    quality: ClassVar[Quality] = "small"

    bits: int = 4  # 2, 3, 4 or 8 a weight
    grid: str = "table"  # any values, a table a row; or affine: evenly spaced ones, which can be exported
    group: int = 0  # columns that share a scale, for `affine` only; 0 for a whole row, 128 costs 0.19 bits a weight
    power: float = 2.0  # p of the importance; 1 to 4 fit alike, 0 counts all weights the same
    weighting: str = "conditional"  # the inverse Hessian's diagonal given the columns before, as released; or plain, as in the text
    spread: bool = True  # rows also try values that count all weights the same, and keep the better; a third longer
    aim: float = 0.5  # share of what the layers before it lost that a layer makes good, given 4 tokens a column; 0 reads half as long
    rounds: int = 4  # turns after the walk; each costs one to three walks, at 8 bits far more; gains most at few
    act_order: bool = True  # columns with the largest inputs first; costs nothing when running
    damping: float = 0.1  # share of the mean diagonal that is added to the Hessian; raised tenfold where it is singular
    where: str = ""  # regular expression on parameter paths, "" for all; what it leaves out keeps its full size

    def apply(self, model: nn.Module) -> None:
        """Replace linear layers and fused experts inside the blocks; weights that are there already are rounded at once."""
        self._check()
        quantize_blocks(model, "lean", self._codec(), self.where)

    def needs_inputs(self) -> bool:
        """Always."""
        return True

    def needs_dense_inputs(self) -> bool:
        """Unless nothing is made good for the layers before."""
        return self.aim > 0

    def solve(self, weight: Tensor, hessian: Tensor, cross: Tensor | None = None) -> tuple[Tensor, ...]:
        """Learn the values, walk over the columns, take turns."""
        from tightfit.techniques._columns import factor, polished, settle, walked

        codec, layer = self._codec(), settle(weight, hessian)
        found = factor(layer, self.damping, self.act_order)
        layer = layer if cross is None else layer.aimed(cross, found, self.aim)
        importance = found.importance if self.weighting == "conditional" else found.plain_importance
        powers = {self.power, 0.0} if self.spread else {self.power}
        grids = (self._fitted(layer.weight, importance(power), codec) for power in sorted(powers, reverse=True))
        codes, grid = walked(layer, found, grids)
        codes, grid = polished(layer.damped(found.damping), codes, grid, self.rounds)
        return codec.stored(grid, codes)

    def _fitted(self, weight: Tensor, importance: Tensor, codec: Any) -> Any:
        from tightfit.formats.grids import TableGrid, fit_table
        from tightfit.formats.ranges import range_grid

        if self.grid == "affine":
            return range_grid(weight, self.bits, codec.groups(weight.shape[1]), searched=True, importance=importance)
        return TableGrid(fit_table(weight, self.bits, importance))

    def solve_bytes(self, rows: int, columns: int) -> int:
        """As every walk over columns."""
        from tightfit.techniques._columns import solve_bytes

        return solve_bytes(rows, columns, fits=True) + (4 * columns * columns if self.aim else 0)

    def _codec(self) -> Any:
        from tightfit.formats.affine import AffineCodec  # here, since naming a technique loads no kernels
        from tightfit.formats.table import TableCodec

        return AffineCodec(self.bits, self.group) if self.grid == "affine" else TableCodec(self.bits)

    def _check(self) -> None:
        check_bits("lean", self.bits)
        if self.grid not in GRIDS:
            raise TightfitError(f"`lean` has no grid `{self.grid}`", hint=near(self.grid, GRIDS))
        if self.weighting not in WEIGHTINGS:
            raise TightfitError(f"`lean` has no weighting `{self.weighting}`", hint=near(self.weighting, WEIGHTINGS))
        if self.group and self.grid != "affine":
            raise TightfitError("`lean:group` goes with `grid=affine`", hint="a table belongs to a whole row")
        if not 0 <= self.aim <= 1:
            raise TightfitError(f"`lean:aim` is a share from 0 to 1, not {self.aim:g}", hint="0.5 serves well; 1 learns the text by heart")
        if self.rounds < 0:
            raise TightfitError(f"`lean:rounds` is at least 0, not {self.rounds}", hint="4 is enough")
        if not 0 < self.damping < 1:
            raise TightfitError(f"`lean:damping` is a share between 0 and 1, not {self.damping:g}", hint="0.1 is the paper's recipe")
