"""Experts: the fused experts of a mixture of experts, resting in few bits and decoded one at a time, when a token asks for them.

transformers 5 keeps a layer's experts in 3-D parameters, which tools that look for `nn.Linear` leave dense. The whole computation is
one operator, since which expert gets how many tokens depends on data that a rehearsal on fake tensors does not have.
"""

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tightfit.formats.codec import Codec, Shape, check_shape, keeping_bits, materialize, part_names, register_parts
from tightfit.formats.linear import replace
from tightfit.terms.errors import TightfitError

TOKENS = 512
"""Most tokens that an expert computes at a time. Bounds the activations; decoding costs a few tokens' time, so little is lost."""

_FLAGS = {"has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel"}
"""What transformers' `use_experts_implementation` sets on a module, with which it describes its computation."""

_LIVE: "weakref.WeakValueDictionary[int, QuantizedExperts]" = weakref.WeakValueDictionary()
"""Modules by `id`: an operator's schema knows tensors and numbers only, so it is handed the number."""


def number_of(module: "QuantizedExperts") -> int:
    """The number by which operators know `module`, as long as it lives."""
    _LIVE[id(module)] = module
    return id(module)


def module_of(number: int) -> "QuantizedExperts":
    """The module that an operator was handed as `number`."""
    return _LIVE[number]


class QuantizedExperts(nn.Module):
    """transformers' fused experts with frozen, encoded matrices. Same forward, same parameter paths.

    Made on `meta` from the dense module, whose attributes, activation and gate it takes over; `absorb` fills it.
    Raises `TightfitError` for experts with a norm of their own after each expert.
    """

    def __init__(self, dense: nn.Module, codec: Codec) -> None:
        super().__init__()
        plain = vars(nn.Module()).keys()
        self.__dict__.update({name: value for name, value in vars(dense).items() if name not in plain})
        if self.has_post_expert_norm:
            raise TightfitError(f"`{type(dense).__name__}` has a norm after each expert, which quantized experts do not compute")
        for name, module in dense.named_children():
            self.add_module(name, module)
        self.codec = codec
        self.apply_gate = type(dense)._apply_gate if self.has_gate else None
        self.matrices = ("gate_up_proj" if self.has_gate else "up_proj", "down_proj")
        self.shapes: dict[str, Shape] = {}
        self.stored_names: dict[str, list[str]] = {}
        for name, parameter in dense.named_parameters(recurse=False):
            if name in self.matrices:
                self._register(name, parameter)
            else:
                self.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))

    def _register(self, name: str, parameter: nn.Parameter) -> None:
        first, second = parameter.shape[1:]
        shape = (second, first) if self.is_transposed else (first, second)
        parts = self.codec.parts(shape)
        self.shapes[name] = shape
        self.stored_names[name] = part_names(name, parts)
        self.num_experts, self.dtype = parameter.shape[0], parameter.dtype
        register_parts(self, name, parts, lead=(parameter.shape[0],))

    @property
    def stored(self) -> list[Tensor]:
        """The stored tensors of both matrices, in the order of `matrices`. Their first dimension is the expert."""
        return [getattr(self, name) for matrix in self.matrices for name in self.stored_names[matrix]]

    @property
    def path(self) -> tuple[str, str]:
        """The kernels with which an expert's first matrix multiplies one token and very many, where it is now."""
        return self.codec.path(self.stored[0].device.type, self.dtype, self.shapes[self.matrices[0]])

    @torch.no_grad()
    def absorb(self, name: str, dense: Tensor) -> None:
        """Take a fused parameter of the checkpoint's shape (experts, …), expert by expert.

        Raises `TightfitError` for a wrong shape, and for NaN or infinite weights.
        """
        with torch.inference_mode(False):
            if name not in self.matrices:
                check_shape(name, dense, self.get_parameter(name).shape)
                materialize(self, name, dense.device).copy_(dense)
                return
            check_shape(name, dense, (self.num_experts, *self._checkpoint_shape(name)))
            for expert, matrix in enumerate(dense):
                self.absorb_expert(name, expert, matrix)

    @torch.no_grad()
    def absorb_expert(self, name: str, expert: int, dense: Tensor) -> None:
        """Take the matrix `name` of one expert, so that the fused tensor need never exist."""
        with torch.inference_mode(False):
            check_shape(name, dense, self._checkpoint_shape(name))
            self.keep_expert(name, expert, self.codec.encode(dense.t().contiguous() if self.is_transposed else dense))

    @torch.no_grad()
    def keep_expert(self, name: str, expert: int, stored: Sequence[Tensor]) -> None:
        """Take the matrix `name` of one expert as the codec's stored tensors, which a solver found."""
        with torch.inference_mode(False):
            for stored_name, tensor in zip(self.stored_names[name], stored, strict=True):
                materialize(self, stored_name, tensor.device)[expert].copy_(tensor)

    def _checkpoint_shape(self, name: str) -> Shape:
        return self.shapes[name][::-1] if self.is_transposed else self.shapes[name]

    def dequantize(self, name: str, expert: int, dtype: torch.dtype | None = None) -> Tensor:
        """The dense matrix (out, in) of one expert, in `dtype` or the dtype of the dense module."""
        tensors = [getattr(self, stored_name)[expert] for stored_name in self.stored_names[name]]
        return self.codec.decode(tensors, self.shapes[name], 0, self.shapes[name][0], dtype or self.dtype)

    def gate(self, x: Tensor) -> Tensor:
        """What stands between the two matrices.  # (tokens, 2 · width) → (tokens, width); as wide as before without a gate"""
        return self.apply_gate(self, x) if self.apply_gate is not None else self.act_fn(x)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """# (tokens, hidden), (tokens, k), (tokens, k) → (tokens, hidden)"""
        x = hidden_states
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        biases = [self.get_parameter(f"{name}_bias") for name in self.matrices] if self.has_bias else []
        return FrozenExperts.apply(x, top_k_index, top_k_weights, self, *self.stored, *biases).to(hidden_states.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedExperts":
        return super()._apply(keeping_bits(fn, self.stored), recurse)

    def extra_repr(self) -> str:
        """Sizes and codec, for `print`."""
        return f"experts={self.num_experts}, {', '.join(f'{name}={shape}' for name, shape in self.shapes.items())}, codec={self.codec}"


def matrices_in(layer: nn.Module) -> int:
    """How many matrices a quantized layer holds: two for each fused expert, else one."""
    return layer.num_experts * len(layer.matrices) if isinstance(layer, QuantizedExperts) else 1


class FrozenExperts(torch.autograd.Function):
    """Experts whose matrices never learn. Keeps its inputs; everything inside is computed again for the backward pass."""

    @staticmethod
    def forward(hidden: Tensor, index: Tensor, weights: Tensor, module: QuantizedExperts, *stored: Tensor) -> Tensor:
        """# (tokens, hidden) → (tokens, hidden)"""
        return experts(hidden, index, weights, list(stored), number_of(module))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs and the stored tensors."""
        hidden, index, weights, ctx.module, *stored = inputs
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            ctx.save_for_backward(hidden, index, weights, *stored)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states and of the routing weights."""
        hidden, index, weights, *stored = ctx.saved_tensors
        grad_hidden, grad_weights = experts_backward(grad, hidden, index, weights, stored, number_of(ctx.module))
        return (grad_hidden, None, grad_weights, None, *[None] * len(stored))


@torch.library.custom_op("tightfit::experts", mutates_args=())
def experts(hidden: Tensor, index: Tensor, weights: Tensor, stored: list[Tensor], module: int) -> Tensor:
    """Every token through its experts, summed by its routing weights. `module` is the number of a `QuantizedExperts`."""
    return forward_experts(module_of(module), hidden, index, weights, stored)


@experts.register_fake
def _(hidden: Tensor, index: Tensor, weights: Tensor, stored: list[Tensor], module: int) -> Tensor:
    return torch.empty_like(hidden)


@torch.library.custom_op("tightfit::experts_backward", mutates_args=())
def experts_backward(
    grad: Tensor, hidden: Tensor, index: Tensor, weights: Tensor, stored: list[Tensor], module: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `experts` for the hidden states and the routing weights."""
    return backward_experts(module_of(module), grad, hidden, index, weights, stored)


@experts_backward.register_fake
def _(grad: Tensor, hidden: Tensor, index: Tensor, weights: Tensor, stored: list[Tensor], module: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weights)


def forward_experts(module: QuantizedExperts, hidden: Tensor, index: Tensor, weights: Tensor, stored: Sequence[Tensor]) -> Tensor:
    """The computation of `experts`, one expert and at most `TOKENS` tokens at a time."""
    total = torch.zeros_like(hidden)
    for expert, token, slot in _assignments(index, module.num_experts):
        first, second, biases = _of_expert(module, stored, expert)
        up = _product(module, 0, hidden.index_select(0, token), first, biases)  # (n, 2 · width)
        inner = module.gate(up)  # (n, width)
        del up
        out = _product(module, 1, inner, second, biases)  # (n, hidden)
        del inner
        total.index_add_(0, token, (out * weights[token, slot, None]).to(total.dtype))
        del out
    return total


def backward_experts(
    module: QuantizedExperts, grad: Tensor, hidden: Tensor, index: Tensor, weights: Tensor, stored: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The computation of `experts_backward`. `d weight = grad · out = (grad @ down) · inner`, so `out` is not computed again."""
    grad_hidden, grad_weights = torch.zeros_like(hidden), torch.zeros_like(weights)
    for expert, token, slot in _assignments(index, module.num_experts):
        first, second, biases = _of_expert(module, stored, expert)
        up = _product(module, 0, hidden.index_select(0, token), first, biases)
        with _autograd_inside():
            inner = module.gate(up.requires_grad_())
        arriving = grad.index_select(0, token)  # (n, hidden)
        along = module.codec.product_transposed(arriving, second, module.shapes[module.matrices[1]])  # (n, width)
        share = (along * inner.detach()).sum(dim=1, dtype=torch.float32)
        if biases:
            share += (arriving * biases[1]).sum(dim=1, dtype=torch.float32)
        del arriving
        grad_weights[token, slot] = share.to(grad_weights.dtype)
        with _autograd_inside():
            (grad_up,) = torch.autograd.grad(inner, up, (along * weights[token, slot, None]).to(along.dtype))
        del along, inner, up
        grad_hidden.index_add_(0, token, module.codec.product_transposed(grad_up, first, module.shapes[module.matrices[0]]))
        del grad_up
    return grad_hidden, grad_weights


def swap_experts(roots: Iterable[tuple[str, nn.Module]], codec: Codec, where: str = "") -> list[str]:
    """Replace the fused experts inside `roots` (path and module) and return their paths. Real weights are absorbed at once.

    `where` is searched in the paths of both matrices. Raises `TightfitError` for experts that it matches and that compute in a way
    not known here: left dense without a word, they would be most of the model.
    """
    replaced = []
    for root, block in roots:
        for path, module in list(block.named_modules()):
            full = f"{root}.{path}"
            stacked = [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
            if isinstance(module, QuantizedExperts) or not any(re.search(where, f"{full}.{name}") for name in stacked):
                continue
            if vars(module).keys() >= _FLAGS:
                replace(block, path, _quantized(module, codec))
                replaced.append(full)
            elif "expert" in full.lower():
                raise TightfitError(
                    f"`{full}` ({type(module).__name__}) holds fused experts that cannot be quantized here",
                    hint="choose other weights with `where`, and these stay dense",
                )
    return replaced


def _quantized(dense: nn.Module, codec: Codec) -> QuantizedExperts:
    module = QuantizedExperts(dense, codec)
    module.train(dense.training)
    for name, parameter in dense.named_parameters(recurse=False):
        if not parameter.is_meta:
            module.absorb(name, parameter.detach())
    return module


def _assignments(index: Tensor, number: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each expert that is chosen: its number, and the tokens and places in `index` that chose it, at most `TOKENS` at a time.

    Numbers from `number` on are nobody's (expert parallelism marks choices of other machines so).
    """
    chosen = index.flatten()
    counts = torch.bincount(chosen, minlength=number).tolist()
    order = chosen.argsort(stable=True)
    start = 0
    for expert, count in enumerate(counts[:number]):
        for begin in range(start, start + count, TOKENS):
            places = order[begin : min(begin + TOKENS, start + count)]
            yield expert, places // index.shape[1], places % index.shape[1]
        start += count


def _of_expert(module: QuantizedExperts, stored: Sequence[Tensor], expert: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """One expert's stored tensors of the first and of the second matrix, and its biases."""
    rows = [tensor[expert] for tensor in stored]
    sizes = [len(module.stored_names[name]) for name in module.matrices]
    return rows[: sizes[0]], rows[sizes[0] : sum(sizes)], rows[sum(sizes) :]


@contextmanager
def _autograd_inside() -> Iterator[None]:
    """Let autograd record inside an operator, below which dispatch has left it behind."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def _product(module: QuantizedExperts, matrix: int, x: Tensor, tensors: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    y = module.codec.product(x, tensors, module.shapes[module.matrices[matrix]])
    return y.add_(biases[matrix].to(y.dtype)) if biases else y
