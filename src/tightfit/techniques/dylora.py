"""dylora: train low-rank adapters so that one run serves every rank up to the largest.

*What shrinks*: gradients and optimizer, as with `lora`; and the search for a rank, from a run for each to one run for all.
*What it costs*: as `lora` of the largest rank, and until the backward pass a copy of the adapters (under `recompute` those of one block);
about 3 KB of torch's and Python's own a row and column, 90 MB for 7B at rank 64. At equal steps a rank may fit a little worse than a
`lora` of that rank alone.
*How it works*: each step draws a rank b, the same for all layers, and only the first b rows of A and columns of B take part:
`y = base(x) + alpha / b · B[:, :b] A[:b] x`. Every row and column is a parameter of its own, so that those left out get no gradient at
all, not one of zeros: neither momentum nor weight decay of any optimizer moves them. In mode `full` all that takes part learns, in mode
`frozen` only row and column b. The draw depends on the seed and the number of the step; where nobody draws, the rank is the largest.
Three settings depart from the papers, and together fit better at equal steps. `scale=largest` weighs a row alike at every rank, by alpha
over the largest; alpha is then to be some two times the largest rank. `slower` lets later rows, which settle what the first ones leave
over, learn at a lower rate. `draw=low` draws low ranks more often, in favour of these and at a cost to the largest.
*Shapes*: in each layer `rank` rows of A (in,) and as many columns of B (out,); in the file lora_A (rank, in) and lora_B (out, rank).
*Relations*: `lora` whose A and B are cut; over `nf4` it is QDyLoRA. The file is a PEFT LoRA of the largest rank, and `truncated` cuts
it to any lower one. Distributed training must allow for parameters without a gradient (DDP's `find_unused_parameters`).
*Paper*: Valipour et al. 2023, DyLoRA (EACL), section 3; Rajabzadeh et al. 2024, QDyLoRA (EMNLP industry), algorithm 1.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tightfit.contracts import Quality, Stage
from tightfit.techniques.lora import ADAPTER, LoRA, adapted_layers, linear_paths, peft_config, refuse_misfit, refuse_second_adapter
from tightfit.terms.errors import TightfitError, near

CHOICES = {"mode": ("full", "frozen"), "scale": ("rank", "largest"), "draw": ("uniform", "low")}
SCALE = "dylora_scale"
"""Beside PEFT's settings in the config of the largest rank, where alpha is to be cut with the rank; PEFT ignores it."""


class Nesting:
    """How much of the adapters takes part, in all layers at once: the first `rank` rows, of which all learn or `only_last`.

    The update is scaled by alpha over `divisor`, or over the rank where that is 0.
    """

    def __init__(self, alpha: float, divisor: int, only_last: bool) -> None:
        self.alpha, self.divisor, self.only_last = alpha, divisor, only_last
        self.rank = 0
        self.scalings: list[dict[str, float]] = []  # the layers' own, which PEFT reads

    def use(self, rank: int) -> None:
        """Let `rank` rows take part from now on."""
        self.rank = rank
        for scaling in self.scalings:
            scaling[ADAPTER] = self.alpha / (self.divisor or rank)


class Rows(nn.Module):
    """A or B as one parameter a rank, in place of the linear layer that PEFT has there. `axis` counts ranks: 0 in A, 1 in B."""

    def __init__(self, matrix: Tensor, axis: int, nesting: Nesting, slower: float) -> None:
        super().__init__()
        self.axis, self.nesting = axis, nesting
        self.rate_factors = {str(place): (place + 1) ** -slower for place in range(matrix.shape[axis])} if slower else {}
        for place, row in enumerate(matrix.detach().unbind(axis)):
            self.register_parameter(str(place), nn.Parameter(row.clone()))

    @property
    def weight(self) -> Tensor:
        """What takes part.  # (rank, in) or (out, rank); rows lie one after the other in both, so that gradients need no copy"""
        rows = list(self._parameters.values())[: self.nesting.rank]
        if self.nesting.only_last:
            rows[:-1] = [row.detach() for row in rows[:-1]]
        stacked = torch.stack(rows)
        return stacked.T if self.axis else stacked

    def forward(self, x: Tensor) -> Tensor:
        """# (…, in) → (…, rank), or (…, rank) → (…, out)"""
        return linear(x, self.weight.to(x.dtype))

    def whole(self) -> Tensor:
        """A copy of all, as PEFT's file has it.  # (largest rank, in) or (out, largest rank)"""
        return torch.stack([row.detach() for row in self.parameters()], self.axis)

    @torch.no_grad()
    def fill(self, matrix: Tensor) -> None:
        """The reverse of `whole`."""
        for row, values in zip(self.parameters(), matrix.unbind(self.axis), strict=True):
            row.copy_(values)


class RankDraw(nn.Module):
    """The `Policy`: a rank for each step from [least, most], by `draw`."""

    def __init__(self, nesting: Nesting, least: int, most: int, draw: str, seed: int) -> None:
        super().__init__()
        self.nesting, self.least, self.most, self.draw, self.seed = nesting, least, most, draw, seed

    def begin_step(self, step: int) -> None:
        """Draw the rank of update `step`."""
        random = Random(f"{self.seed} {step}")  # a string, so that near seeds draw apart
        if self.draw == "low":
            self.nesting.use(self.least + int((self.most - self.least + 1) * random.random() ** 2))
        else:
            self.nesting.use(random.randint(self.least, self.most))

    def end_training(self) -> None:
        """All rows take part."""
        self.nesting.use(self.most)


@dataclass(frozen=True)
class DyLoRA:
    """Low-rank adapters that can be cut to any rank; all else is frozen."""

    stage: ClassVar[Stage] = Stage.ADAPT
    quality: ClassVar[Quality] = "exact"
    stem: ClassVar[str] = "adapter"

    rank: int = 64  # the largest; parameters and optimizer grow with it, and each rank is drawn more seldom
    alpha: float = 16.0  # the update is scaled by alpha / the rank in use, or as `scale` has it
    dropout: float = 0.0  # of the adapters' inputs; keeps a mask a layer for the backward pass
    where: str = ""  # regular expression on the layers' paths, "" for every linear layer of the blocks
    least: int = 1  # the smallest that is drawn; a higher one spends no steps on ranks that nobody will use
    mode: str = "full"  # or frozen: only the last row drawn learns, so that lower ranks stay as they are, and each row learns seldom
    scale: str = "rank"  # or largest: alpha over the largest rank at every rank; costs nothing, fits low ranks far better with `slower`
    slower: float = 0.0  # row j learns at 1 / j**slower times the rate, without weight decay; at 0.5 seldom drawn rows disturb less
    draw: str = "uniform"  # or low: 1 of 32 in 18 steps of 100 and not in 3; fits ranks to 4 better, from 8 on worse
    seed: int = 0  # of the draws; costs nothing

    def apply(self, model: nn.Module) -> None:
        """Freeze the model and wrap its layers. On `meta` the adapters are there too; `initialise` fills them later."""
        self._check(model)
        LoRA(self.rank, self.alpha, self.dropout, self.where).apply(model)
        nesting = Nesting(self.alpha, self.rank if self.scale == "largest" else 0, only_last=self.mode == "frozen")
        for layer in adapted_layers(model):
            for axis, part in enumerate((layer.lora_A, layer.lora_B)):
                part[ADAPTER] = Rows(part[ADAPTER].weight, axis, nesting, self.slower)
            nesting.scalings.append(layer.scaling)
        model.rank_draw = RankDraw(nesting, self.least, self.rank, self.draw, self.seed)
        model.rank_draw.end_training()

    def _check(self, model: nn.Module) -> None:
        if self.rank < 1:
            raise TightfitError(f"`dylora:rank` is at least 1, not {self.rank}", hint="64 is the paper's")
        if not 1 <= self.least <= self.rank:
            raise TightfitError(f"`dylora:least` is between 1 and the rank, {self.rank}, not {self.least}", hint="1 serves every rank")
        for name, offered in CHOICES.items():
            if (wish := vars(self)[name]) not in offered:
                raise TightfitError(f"`dylora` has no {name} `{wish}`", hint=near(wish, offered))
        if not 0 <= self.slower <= 1:
            raise TightfitError(f"`dylora:slower` is between 0 and 1, not {self.slower}", hint="0.5 was good, 0 is the papers'")
        refuse_second_adapter(model, "dylora")
        linear_paths(model, self.where, "dylora")

    def initialise(self, model: nn.Module) -> None:
        """Give the adapters the first values of `lora` where their layers lie: A as PEFT's, B zero."""
        for layer in adapted_layers(model):
            first, second = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            device = next(layer.base_layer.parameters()).device
            first.to_empty(device=device), second.to_empty(device=device)
            first.fill(nn.init.kaiming_uniform_(torch.empty(self.rank, layer.in_features, device=device), a=math.sqrt(5)))
            second.fill(torch.zeros(layer.out_features, self.rank, device=device))

    def learned_config(self, model: nn.Module) -> dict[str, Any]:
        """PEFT's `adapter_config.json` for the largest rank, and how `truncated` is to scale where that is not by the rank."""
        config = peft_config(model, self.rank, self.alpha, self.dropout)
        return config if self.scale == "rank" else config | {SCALE: self.scale}

    def learned_state(self, model: nn.Module) -> dict[str, Tensor]:
        """A and B of each layer under PEFT's names; copies, since rows rest apart.  # lora_A (rank, in), lora_B (out, rank), float32"""
        return {name: rows.whole() for name, rows in _rows(model)}

    def load_learned(self, model: nn.Module, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the adapters. Raises `TightfitError`, and changes nothing, where it, rank, alpha or scale do not fit."""
        here, there = {"r": self.rank, "lora_alpha": self.alpha, SCALE: self.scale}, {SCALE: "rank"} | dict(config)
        other = [f"{key} {there.get(key)} in place of {value}" for key, value in here.items() if there.get(key) != value]
        if other:
            raise TightfitError(f"the adapter has {' and '.join(other)}", hint="apply `dylora` with the settings of the adapter")
        refuse_misfit(self.learned_state(model), state)
        for name, rows in _rows(model):
            rows.fill(state[name])


def set_rank(model: nn.Module, rank: int) -> None:
    """Let the first `rank` rows take part from now on, to evaluate or generate with. Raises `TightfitError` outside 1 … largest."""
    found = next((module for module in model.modules() if isinstance(module, RankDraw)), None)
    if found is None:
        raise TightfitError("this model has no adapters of several ranks", hint="apply `dylora` first")
    _check_rank(rank, found.most)
    found.nesting.use(rank)


def truncated(config: Mapping[str, Any], state: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The plain PEFT LoRA of `rank` within that of the largest. PEFT divides alpha by the rank of the file: it stays where training did so
    too, and is cut with the rank where that divided by the largest.

    Raises `TightfitError` for a rank outside 1 … largest.
    """
    _check_rank(rank, config["r"])
    cut = {
        name: tensor.narrow(1 if ".lora_B." in name else 0, 0, rank).clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    alpha = config["lora_alpha"] * rank / config["r"] if config.get(SCALE) == "largest" else config["lora_alpha"]
    return {**{key: value for key, value in config.items() if key != SCALE}, "r": rank, "lora_alpha": alpha}, cut


def _check_rank(rank: int, most: int) -> None:
    if not 1 <= rank <= most:
        raise TightfitError(f"the adapter has ranks 1 to {most}, and not {rank}", hint=f"`--rank {min(max(rank, 1), most)}` is the nearest")


def _rows(model: nn.Module) -> Iterator[tuple[str, Rows]]:
    """A and B of each layer by their names in PEFT's file."""
    for path, module in model.named_modules():
        if isinstance(module, Rows):
            yield f"base_model.model.{path.removesuffix(f'.{ADAPTER}')}.weight", module
