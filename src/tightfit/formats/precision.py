"""Precision: compute with parameters that rest in 32 bits in the precision of what comes in."""

from typing import Any

from torch import Tensor, nn


def in_given_precision(module: nn.Module, forward: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call `forward` of `module` with its parameters in the precision of `hidden`; their gradients arrive where they rest.

    For `module.forward = partial(in_given_precision, module, module.forward)`. The other way round, raising `hidden`, would keep a
    copy of it in 32 bits for the backward pass. Inside a recomputed forward the copies of the parameters do not outlive it either.
    """
    resting = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and parameter.dtype != hidden.dtype
    ]
    for owner, name, parameter in resting:
        owner._parameters[name] = parameter.to(hidden.dtype)  # type: ignore[assignment]
    try:
        return forward(hidden, *args, **kwargs)
    finally:
        for owner, name, parameter in resting:
            owner._parameters[name] = parameter
