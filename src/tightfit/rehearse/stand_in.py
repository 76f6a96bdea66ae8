"""Stand-in: what is rehearsed in place of a module whose shapes depend on data, which fake tensors do not have.

Each does the work of the worst case: every token chooses the same experts. Fused experts need none, they are one operator.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from tightfit.terms.errors import TightfitError

NLLB_CHOICES = 2
"""Experts that a token goes through (NLLB-200, section 6). transformers 5.23 itself takes its router's mask for indices."""


def nllb_experts(self: Any, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
    """Two experts, one after the other, for all tokens.  # (tokens, width) → (tokens, width)"""
    total = hidden_states.new_zeros(hidden_states.shape)
    for place in range(NLLB_CHOICES):
        total += self[f"expert_{place}"](hidden_states.clone()) * router_probs[:, place, None]
    return total


STAND_INS: dict[str, Callable[..., Tensor]] = {"NllbMoeExperts": nllb_experts}
"""By class name, so that no model's code is imported."""


@contextmanager
def standing_in(model: nn.Module) -> Iterator[None]:
    """Give the modules that need one their stand-in. What still asks for data is told in one line."""
    for module in model.modules():
        if type(module).__name__ in STAND_INS:
            module.forward = MethodType(STAND_INS[type(module).__name__], module)
    try:
        yield
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise TightfitError(
            f"`{type(model).__name__}` decides shapes from its data (`{error.func}`), so it cannot be rehearsed",
            hint="please report the model; a stand-in in `rehearse/stand_in.py` is a few lines",
        ) from error
