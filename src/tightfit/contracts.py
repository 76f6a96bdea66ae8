"""Every socket of tightfit on one page: what a technique, a quantized weight and a ring of blocks promise."""

from collections.abc import Mapping
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

Quality = Literal["exact", "near", "small"]
QUALITIES: tuple[Quality, ...] = ("exact", "near", "small")
"""What a technique may do to the weights: `exact` keeps the stored precision, `near` at least 4 bits, `small` anything."""


class Stage(IntEnum):
    """When a transform is applied. Techniques are chosen in any order and applied in this one."""

    SHAPE = 0
    QUANTIZE = 1
    ADAPT = 2
    ATTEND = 3
    MOVE = 4
    RECOMPUTE = 5
    OBJECTIVE = 6


@runtime_checkable
class Transform(Protocol):
    """One change to a model. A technique is a frozen dataclass with these members; its fields are its settings.

    `apply` changes structure only and works on `meta` tensors: contents come later, block by block, when weights are read.
    It never renames parameter paths, and raises `TightfitError` when its `where` matches nothing.
    """

    stage: ClassVar[Stage]
    quality: ClassVar[Quality]

    def apply(self, model: "nn.Module") -> None:
        """Change `model` in place."""
        ...


@runtime_checkable
class Settles(Protocol):
    """A technique with settings that are left to the machine (`auto`). The planner decides them, so that a plan means one thing."""

    def settled(self, device: str) -> Transform:
        """The same technique for a run on `device` (`cpu` or `cuda`) of this machine, with nothing left open."""
        ...


@runtime_checkable
class Solves(Protocol):
    """A technique that quantizes a layer for the inputs that it really gets: `quantize` brings them, layer by layer.

    `apply` prepares the layers as any transform does; a dense weight that is absorbed there is rounded without knowing its inputs. The
    planner never chooses such a technique by itself.
    """

    def needs_inputs(self) -> bool:
        """Whether `solve` looks at the Hessian at all."""
        ...

    def needs_dense_inputs(self) -> bool:
        """Whether `solve` looks at what the dense model feeds the layer too: samples then go through both."""
        ...

    def solve(self, weight: "Tensor", hessian: "Tensor", cross: "Tensor | None" = None) -> "tuple[Tensor, ...]":
        """The stored tensors of a layer's codec. All is float32.

        # weight (rows, columns); hessian (columns, columns): the mean of 2 x xᵀ over the layer's inputs x
        # cross, as large: the mean of 2 y xᵀ, y being what the dense model feeds the layer; None where it is not needed
        Raises `TightfitError` for what is not finite, and for a Hessian that stays singular.
        """
        ...

    def solve_bytes(self, rows: int, columns: int) -> int:
        """Most bytes that are alive while a layer is solved, beside the layer itself: its Hessian and what `solve` takes."""
        ...


@runtime_checkable
class Initialises(Protocol):
    """A technique that adds parameters which no checkpoint holds. On a live model `apply` gives them values itself."""

    def initialise(self, model: "nn.Module") -> None:
        """Give them their first values, once the weights of a model that was on `meta` are in place."""
        ...


@runtime_checkable
class Learns(Protocol):
    """A technique whose learned tensors are kept without the model, in `<stem>_config.json` and `<stem>_model.safetensors`."""

    stem: ClassVar[str]

    def learned_config(self, model: "nn.Module") -> dict[str, Any]:
        """What the tensors mean, as plain JSON values; for an adapter that PEFT knows, PEFT's own config."""
        ...

    def learned_state(self, model: "nn.Module") -> dict[str, "Tensor"]:
        """The learned tensors by the names that they have in the file. No copies."""
        ...

    def load_learned(self, model: "nn.Module", config: Mapping[str, Any], state: Mapping[str, "Tensor"]) -> None:
        """Copy a file's tensors into `model`, to which this technique was applied.

        Raises `TightfitError` for missing, unknown or misshapen tensors; nothing is changed then.
        """
        ...


@runtime_checkable
class Policy(Protocol):
    """A module that acts at each training step: draws a rank, follows a freezing schedule. A technique leaves it in the model.

    What it does depends on nothing but the number of the step, so that every process and a resumed run do the same.
    """

    def begin_step(self, step: int) -> None:
        """The update number `step`, counted from 0, begins: called once before the forward pass of its first batch."""
        ...

    def end_training(self) -> None:
        """No step is under way: evaluate and save the whole of what was learned."""
        ...


@runtime_checkable
class Paced(Protocol):
    """A module some of whose own parameters want another learning rate than the rest."""

    rate_factors: Mapping[str, float]  # own parameter → times the learning rate


@runtime_checkable
class Beside(Protocol):
    """A module that a technique put beside the model. Its blocks are trained: they never rest elsewhere, take turns or are quantized."""

    beside: ClassVar[bool]


@runtime_checkable
class Absorbs(Protocol):
    """A module whose weights rest in another form than they are stored. It takes a dense tensor and keeps its own form of it."""

    def absorb(self, name: str, dense: "Tensor") -> None:
        """Take the dense parameter `name` (`weight`, `bias`, …), of the shape it has in the checkpoint, and keep it."""
        ...


class Ring(Protocol):
    """Blocks that take turns in few slots of fast memory."""

    def acquire(self, position: int) -> None:
        """Make the weights of the block at `position` usable, and give up those of the block acquired before.

        Called at the start of each block's forward pass, and again when the block is recomputed for its backward pass.
        """
        ...
