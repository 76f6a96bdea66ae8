"""Networks whose steps are captured: tiny real models of Hugging Face, and two of our own for what those do not have."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from families import ids, make
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tightfit.describe.tape import Tape
from tightfit.rehearse.capture import record


class Convolutions(nn.Module):
    """Branches, batch normalization that changes its buffers, ReLU in place, pooling with indices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Sequential(nn.Conv2d(8, 6, 1), nn.Conv2d(6, 6, 3, padding=1))
        self.head = nn.Linear(10, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels)
        return self.head(torch.cat((self.left(x), self.right(x)), 1).relu_().mean((2, 3)))


class Recurrent(nn.Module):
    """Two layers of cells, and torch's own recurrent layer, whose workspace only its own backward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.LSTMCell(12, 12), nn.LSTMCell(12, 12)])
        self.lstm = nn.LSTM(12, 12, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        states = [(x.new_zeros(len(x), 12),) * 2 for _ in self.cells]
        outputs = []
        for step in x.unbind(1):
            for at, cell in enumerate(self.cells):
                states[at] = cell(step, states[at])
                step = step + states[at][0]
            outputs.append(step)
        return self.lstm(torch.stack(outputs, 1))[0]


def _language(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    inputs = {"input_ids": ids((3, 21), 384)} | ({"decoder_input_ids": ids((3, 9), 384)} if family == "t5" else {})
    return make(family, dtype), inputs | ({} if family == "bert" else {"use_cache": False})


def _vision() -> tuple[nn.Module, dict[str, Tensor]]:
    return make("vit"), {"pixel_values": torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))}


def _plain(kind: type[nn.Module], *shape: int) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    name = "pixels" if kind is Convolutions else "x"
    return kind().eval(), {name: torch.rand(shape)}


EXAMPLES: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    **{name: lambda name=name: _language(name) for name in ("bert", "gpt2", "llama-tied", "t5")},
    "mixtral": lambda: _language("mixtral"),
    "mixtral-narrow": lambda: _language("mixtral", torch.bfloat16),
    "vit": _vision,
    "convolutions": lambda: _plain(Convolutions, 2, 3, 18, 18),
    "recurrent": lambda: _plain(Recurrent, 3, 5, 12),
}
TRAINED = [name for name in EXAMPLES if name != "mixtral-narrow"]


@cache
def example(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Made once; tests leave weights and buffers as they are."""
    return EXAMPLES[name]()


@cache
def recorded(name: str, training: bool = False) -> Tape:
    return record(*example(name), training, loss_of if training else None)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def loss_of(output: Any) -> Tensor:
    return tensors_of(output)[0].float().square().mean()
