"""recompute: forget the activations inside each block, and compute them again when the backward pass needs them.

*What shrinks*: activations kept for the backward pass; per block only its input stays, (batch, tokens, width).
*What it costs*: one more forward pass per step, about a third of the time.
*How it works*: each block's forward runs under `torch.utils.checkpoint` (non-reentrant) while gradients are on; random states are
replayed, so dropout is the same. Without gradients it does nothing.
*Shapes*: none change. *Relations*: as BMInf's model checkpointing, but gradients reach parameters inside blocks; it lets `offload`
stream while tuning, since a block's weights are fetched again for its recomputation.
*Paper*: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost; BMInf (ACL 2022), model checkpointing.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tightfit.contracts import Quality, Stage
from tightfit.describe.blocks import block_lists
from tightfit.terms.errors import TightfitError


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


@dataclass(frozen=True)
class Recompute:
    """Checkpoint every `every`-th block."""

    stage: ClassVar[Stage] = Stage.RECOMPUTE
    quality: ClassVar[Quality] = "exact"

    every: int = 1  # 1: least memory; n: only each n-th block is recomputed, (n - 1) / n of the activations stay

    def apply(self, model: nn.Module) -> None:
        """Wrap the blocks' forward passes; works on any device, `meta` too."""
        blocks = [block for _, stack in block_lists(model) for block in stack]  # those beside the model too
        if not blocks:
            raise TightfitError("`recompute` found no repeated blocks in this model")
        if self.every < 1:
            raise TightfitError(f"`recompute:every` is at least 1, not {self.every}")
        for block in blocks[:: self.every]:
            block.forward = partial(_recomputed, block.forward)
