"""Linear: the layer whose weight rests in few bits, its product with a frozen weight, and the swap that puts it into a model."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tightfit.formats.codec import Codec, Shape, check_shape, keeping_bits, materialize, part_names, register_parts

LINEARS = {
    ("torch.nn.modules.linear", "Linear"): False,
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"): False,
    ("transformers.pytorch_utils", "Conv1D"): True,
}
"""Layers that can be swapped, by module and class, and whether their weight is stored (in, out). Exact types only: a subclass may use
its weight in another way (`nn.MultiheadAttention` reads that of its output layer)."""

ROUTERS = re.compile(r"(^|\.)(gate|router|shared_expert_gate|weights_proj)(\.|$)")
"""Path components of small layers whose output is a choice (of experts, of tokens): a rounding there flips it. `weights_proj` also
reads its weight's dtype."""


class QuantizedLinear(nn.Module):
    """A linear layer with a frozen weight, which rests in `codec`.

    Made on `meta`; `absorb` fills it. Parameter paths are those of the dense layer: `weight` (codes), `weight_…`, `bias`.
    `transposed`: the checkpoint stores the weight (in, out), as GPT-2's `Conv1D` does. `dtype`: of the dense weight and the bias.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        codec: Codec,
        *,
        bias: bool = True,
        transposed: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.codec = codec
        self.transposed = transposed
        self.dtype = dtype
        parts = codec.parts(self.shape)
        self.stored_names = part_names("weight", parts)
        register_parts(self, "weight", parts)
        bias_tensor = nn.Parameter(torch.empty(out_features, dtype=dtype, device="meta"), requires_grad=False) if bias else None
        self.register_parameter("bias", bias_tensor)

    @property
    def shape(self) -> Shape:
        """Of the dense weight: (out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def stored(self) -> list[Tensor]:
        """The weight's stored tensors, in the codec's order."""
        return [getattr(self, name) for name in self.stored_names]

    @property
    def path(self) -> tuple[str, str]:
        """The kernels that multiply one token and very many, where the weight is now and in the layer's `dtype`."""
        return self.codec.path(self.stored[0].device.type, self.dtype, self.shape)

    @torch.no_grad()
    def absorb(self, name: str, dense: Tensor) -> None:
        """Take the checkpoint's `weight` or `bias` and keep it, on the dense tensor's device unless the layer has one already.

        Raises `TightfitError` for a wrong shape, and for NaN or infinite weights.
        """
        with torch.inference_mode(False):  # else a weight that is read while generating could never be tuned through
            if name == "bias":
                check_shape(name, dense, (self.out_features,))
                materialize(self, name, dense.device).copy_(dense)
                return
            if name != "weight":
                raise KeyError(name)
            check_shape(name, dense, self.shape[::-1] if self.transposed else self.shape)
            self.keep(self.codec.encode(dense.t().contiguous() if self.transposed else dense))

    @torch.no_grad()
    def keep(self, stored: Sequence[Tensor]) -> None:
        """Take the weight as the codec's stored tensors, which a solver found."""
        with torch.inference_mode(False):
            for name, tensor in zip(self.stored_names, stored, strict=True):
                materialize(self, name, tensor.device).copy_(tensor)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight, (out_features, in_features), in `dtype` or the layer's own."""
        return self.codec.decode(self.stored, self.shape, 0, self.out_features, dtype or self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`.  # (..., in) → (..., out)"""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.reshape(-1, self.in_features)
        y = FrozenProduct.apply(rows, self.bias, self.codec, self.shape, *self.stored)
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        return super()._apply(keeping_bits(fn, self.stored), recurse)

    def extra_repr(self) -> str:
        """Sizes and codec, for `print`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, codec={self.codec}"


class FrozenProduct(torch.autograd.Function):
    """`x @ dense.T + bias` for an encoded weight that never learns; `x` and the bias may.

    Keeps only the stored tensors for the backward pass, which decodes them again. They go through `save_for_backward`, so that a
    checkpointed block is recomputed (and a streamed one fetched) before they are read.
    """

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, codec: Codec, shape: Shape, *stored: Tensor) -> Tensor:
        """# (tokens, in) → (tokens, out)"""
        y = codec.product(x, stored, shape)
        return y if bias is None else y.add_(bias.to(y.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the stored tensors, and only where a gradient of `x` is wanted."""
        _, bias, ctx.codec, ctx.shape, *stored = inputs
        ctx.bias_dtype = None if bias is None else bias.dtype
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*stored)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `x` and of the bias.  # (tokens, out) → (tokens, in)"""
        stored = ctx.saved_tensors
        grad_x = ctx.codec.product_transposed(grad, stored, ctx.shape) if ctx.needs_input_grad[0] else None
        grad_bias = grad.sum(dim=0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return (grad_x, grad_bias, *[None] * (len(ctx.needs_input_grad) - 2))


def swap_linears(
    model: nn.Module,
    roots: Iterable[tuple[str, nn.Module]],
    codec: Codec,
    where: str = "",
    skip: Callable[[str], bool] = lambda path: ROUTERS.search(path) is not None,
) -> list[str]:
    """Replace the linear layers inside `roots` (path and module, such as the model's blocks), and return the paths of those replaced.

    `where` is a regular expression that is searched in the path of the weight; `skip(path inside the root)` keeps a layer. Tied layers
    stay. Real weights are absorbed at once.
    """
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    replaced = []
    for root, block in roots:
        for path, linear in list(block.named_modules()):
            kind = (type(linear).__module__, type(linear).__name__)
            if kind not in LINEARS or owners[id(linear.weight)] > 1 or skip(path) or not re.search(where, f"{root}.{path}.weight"):
                continue
            replace(block, path, _quantized(linear, codec, transposed=LINEARS[kind]))
            replaced.append(f"{root}.{path}")
    return replaced


def replace(block: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` into `block` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, module)


def _quantized(linear: nn.Module, codec: Codec, transposed: bool) -> QuantizedLinear:
    weight, bias = linear.weight, linear.bias
    columns, rows = weight.shape if transposed else weight.shape[::-1]
    layer = QuantizedLinear(columns, rows, codec, bias=bias is not None, transposed=transposed, dtype=weight.dtype)
    layer.train(linear.training)
    if bias is not None:
        layer.bias.requires_grad_(bias.requires_grad)
    if not weight.is_meta:
        layer.absorb("weight", weight.detach())
        if bias is not None:
            layer.absorb("bias", bias.detach())
    return layer
