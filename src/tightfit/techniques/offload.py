"""offload: let some blocks rest in RAM or on disk and take turns in few slots of fast memory.

*What shrinks*: weights on the compute tier; of the streamed blocks only `slots` are there at a time.
*What it costs*: every pass moves the streamed blocks over the link; with resident blocks spread evenly between them, a pass takes
max(compute, transfer). Decoding a token moves as much as reading a whole prompt, so it feels the link most.
*How it works*: each streamed block's forward first asks the ring for its weights, and the ring fetches the next block's while this
one runs. Nothing is rounded: results are those of the resident model, bit for bit.
*Shapes*: none change; a block that is not running holds empty tensors in place of its frozen weights.
*Relations*: as accelerate's `device_map` offload, but with prefetch; as BMInf, but blocks may differ, other weights inside blocks may
be trained, and weights may come straight from the model's files. Tuning needs `recompute` on every streamed block, since a block's
backward pass must find its weights: without it, autograd raises. Trainable parameters stay resident.
*Paper*: BMInf (ACL 2022 demo), CPU-GPU scheduling.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from torch import nn

from tightfit.contracts import Quality, Ring, Stage
from tightfit.describe.blocks import blocks_of
from tightfit.terms.errors import TightfitError


@dataclass
class StreamSocket:
    """Where a ring is plugged into a model: `blocks` by position ask `ring` for their weights. None until the model is built."""

    ring: Ring | None = None
    blocks: dict[int, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True)
class Offload:
    """Let the blocks at the positions `streamed` take turns; positions count over all stacks of the model in order."""

    stage: ClassVar[Stage] = Stage.MOVE
    quality: ClassVar[Quality] = "exact"

    streamed: tuple[int, ...] = ()  # the planner's choice; each saves its weights on the compute tier, and is moved once per pass
    slots: int = 2  # at least 2; each more hides one more block's transfer behind uneven work, + one block's weights

    def apply(self, model: nn.Module) -> None:
        """Wrap the streamed blocks' forward passes and leave the socket at `model.stream_socket`; works on any device, `meta` too.

        A later `recompute` wraps this again, so that its recomputation acquires the block once more.
        Raises `TightfitError` for positions that the model has not, and when it is offloaded already.
        """
        blocks = [block for _, block in blocks_of(model)]
        self._check(len(blocks), again="stream_socket" in vars(model))
        socket = StreamSocket(blocks={position: blocks[position] for position in sorted(self.streamed)})
        for position, block in socket.blocks.items():
            block.forward = partial(_acquired, socket, position, block.forward)
        model.stream_socket = socket

    def _check(self, count: int, again: bool) -> None:
        wrong = [position for position in self.streamed if position not in range(count)]
        faults = [
            (again, "this model is offloaded already"),
            (not count, "no repeated blocks were found in this model"),
            (not self.streamed, "`offload:streamed` names no block"),
            (count and wrong, f"no block lies at {', '.join(map(str, wrong))}; positions go from 0 to {count - 1}"),
            (len(set(self.streamed)) < len(self.streamed), "`offload:streamed` names a block twice"),
            (self.slots < 2, f"`offload:slots` is at least 2, one to run and one to fill, not {self.slots}"),
        ]
        lines = [line for found, line in faults if found]
        if lines:
            raise TightfitError("; ".join(lines), hint="let `tightfit plan` choose the blocks, or leave `offload` out")


def _acquired(socket: StreamSocket, position: int, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if socket.ring is None:
        raise TightfitError(
            f"block {position} is streamed, and nothing brings its weights",
            hint="run the model through `tightfit.build`, which plugs a ring into `model.stream_socket`",
        )
    socket.ring.acquire(position)
    return forward(*args, **kwargs)
