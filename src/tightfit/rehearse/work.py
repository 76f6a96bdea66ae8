"""Work: what one operation computes, how many bytes it reads and writes, and what it allocates inside, beside its results."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from tightfit.formats.workspace import TOUCHED, WORKSPACE
from tightfit.terms.units import KIB

_GATHERS = {
    torch.ops.aten.embedding.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_select.default,
    torch.ops.aten.gather.default,
}
"""Operations that read no more of their first argument than they give back."""
_LANES = 16
"""Channels that oneDNN's layouts for the CPU are padded to."""


def work_of(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[float, int]:
    """Floating-point operations of one call, as torch's flop counter sees them, and the bytes that it reads and writes."""
    formula = flop_registry.get(func._overloadpacket) or _FLOPS.get(str(func._overloadpacket))
    flops = float(formula(*args, **kwargs, out_val=result)) if formula else 0.0
    if func in TOUCHED:
        return flops, TOUCHED[func](args, kwargs)
    if func in _GATHERS:
        return flops, sum(map(_reached, _tensors((args[1:], kwargs)))) + 2 * sum(map(_reached, _tensors(result)))
    return flops, sum(map(_reached, _tensors((args, kwargs, result))))


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def _reached(tensor: Tensor) -> int:
    """Bytes of a tensor; of one that is expanded, what there is."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _grouped_flops(one: Any, other: Any, *args: Any, out_val: Any, **kwargs: Any) -> int:
    """Of rows by a weight for each group: every row meets one weight. Of columns by rows (the weights' gradient): every pair meets once."""
    return 2 * one.numel() * other.shape[-1]


_FLOPS: Mapping[str, Callable[..., int]] = {"aten._grouped_mm": _grouped_flops}
"""What torch's flop counter does not know. Kept here, since its registry is everyone's."""


def scratch_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes that one call allocates inside, beside its results; an upper bound where the house's tables or those of oneDNN know any."""
    if func in WORKSPACE:
        return WORKSPACE[func](args, kwargs)
    first = next(_tensors((args, kwargs)), None)
    if first is None or first.device.type != "cpu" or func not in _SCRATCH:
        return 0
    return _SCRATCH[func](args, result)


def _convolution_scratch(args: Any, result: Any) -> int:
    """Input and weight in oneDNN's layouts while it computes, and the output in it beside the plain one. Measured with torch 2.13."""
    x, weight, *_ = args
    if all(size == 1 for size in weight.shape[2:]):
        return 0
    output = _laid_out(result)
    return max(_laid_out(x) + _reached(weight) + output - _reached(result), output)


def _convolution_backward_scratch(args: Any, result: Any) -> int:
    gradient, x, weight, *_ = args
    return 0 if all(size == 1 for size in weight.shape[2:]) else _laid_out(gradient) + _laid_out(x) + _reached(weight)


def _laid_out(tensor: Tensor) -> int:
    """Bytes in a layout by groups of channels; images of few channels are read as they are."""
    channels = tensor.shape[1]
    return _reached(tensor) * -(-channels // _LANES) * _LANES // channels if channels >= _LANES // 2 else 0


def _recurrent_scratch(args: Any, result: Any) -> int:
    """The weights in oneDNN's layouts, and for each step the four gates and the states."""
    return sum(map(_reached, args[1:5])) + 6 * _reached(result[0]) + 16 * KIB


_SCRATCH: dict[Any, Callable[[Any, Any], int]] = {
    torch.ops.aten.convolution.default: _convolution_scratch,
    torch.ops.aten.convolution_backward.default: _convolution_backward_scratch,
    torch.ops.aten.mkldnn_rnn_layer.default: _recurrent_scratch,
}
