"""side: train a narrow network beside the model, fed from the hidden state of each block, and leave the model itself frozen.

*What shrinks*: activations; the backward pass goes through blocks of width d / reduction only. Gradients and optimizer too.
*What it costs*: a narrow forward and backward pass a step. What a downsampler learns from is kept: batch · tokens · d a block, except by
`max_pool` and `avg_pool`, which learn nothing and fit a little worse. When running, a second, narrow KV cache.
*How it works*: `h = a · base + (1 - a) · U(side)`, a one at first, so that tuning starts exactly at the model, and a learns first. A side
block takes `(1 - b) · D(h_f) + b · h_g` with b = sigmoid(gamma), gamma zero at first. The base runs without gradients and as in
evaluation, so that it may be in any format and its weights may leave as soon as a block has run. Trained: the side network, and a head
that predicts no tokens (a classifier). They are in 32 bits and compute in the precision of the hidden state.
*Shapes*: hidden (batch, tokens, d), side (batch, tokens, d / reduction); `gamma` (blocks,), `alpha` (), `up` (d, d / reduction).
*Relations*: the side network is a model of the same class and its caches, masks and positions are that class's. Beside `recompute` the
side's blocks are recomputed, the base's never. Several side networks may stand beside one base; one is active at a time.
It is refused beside other adapters. What is kept are the side network and the head, never the base.
*Paper*: Zhang et al. 2024, Quantized Side Tuning (ACL), section 3. As in its released code and its table of parameters, one
downsampler a block, the first of which serves the embedding too; unlike the code, a and gamma are the paper's scalars. First values from
the base, which that paper lacks, are after Sung et al. 2022, LST (NeurIPS), section 3.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tightfit.contracts import Quality, Stage
from tightfit.techniques._side_network import SideNetwork, Sides, combined, freeze, parts_of, trained_head
from tightfit.techniques.lora import fill_learned, refuse_misfit
from tightfit.terms.errors import TightfitError, near

DOWNSAMPLES = ("adapter", "lora", "linear", "max_pool", "avg_pool")
INITS = ("random", "base")


@dataclass(frozen=True)
class Side:
    """A narrow network beside the frozen model."""

    stage: ClassVar[Stage] = Stage.ADAPT
    quality: ClassVar[Quality] = "exact"
    stem: ClassVar[str] = "side"

    reduction: int = 16  # the side's width is d / reduction; 2 to 64 fit alike in the paper, memory falls until 16 and little after
    downsample: str = "adapter"  # or lora, linear, max_pool, avg_pool; only the pools keep no hidden state of full width
    rank: int = 16  # of `adapter` and `lora`; parameters grow by blocks · rank · d
    init: str = "random"  # or base: copies of its blocks, for reduction 1 and `linear` only: fits far better, 16 bytes a parameter
    mix_rate: float = 50.0  # times the learning rate, for a and gamma: nothing else learns before a leaves one, a step of Adam at a time
    name: str = "default"  # of the side network; others may stand beside the same base, each + its own weights

    def apply(self, model: nn.Module) -> None:
        """Freeze the model and put a side network at `model.side`. On `meta` it is empty too; `initialise` fills it later."""
        self._check(model)
        inner, stack, _ = parts = parts_of(model)
        on_meta = all(parameter.is_meta for parameter in model.parameters())
        with torch.device("meta"):
            side = SideNetwork(self, *parts)
        if "side" not in model._modules:
            freeze(model, inner, stack)
            model.side = Sides(next(path for path, module in inner.named_modules() if module is stack))
            inner.forward = partial(combined, model.side, inner, inner.forward)
        side.train(model.training)
        model.side[self.name] = side
        activate(model, self.name)
        if not on_meta:
            self.initialise(model)

    def initialise(self, model: nn.Module) -> None:
        """Give the side network its first values, where the model's embedding lies. `TightfitError` where `init` cannot read the base."""
        side = model.side[self.name]
        side.fill(model.get_input_embeddings().weight.device)
        if self.init == "base":
            side.copy_base(parts_of(model)[0])

    def learned_config(self, model: nn.Module) -> dict[str, Any]:
        """The settings, and the shape of the base."""
        return asdict(self) | _shape(model)

    def learned_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of the side network under `side.`, those of a trained head under `head.`; none before `apply`."""
        if "side" not in model._modules or self.name not in model.side:
            return {}
        return _state(model, model.side[self.name])

    def load_learned(self, model: nn.Module, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the side network `name`, whatever it was called where it was tuned.

        Raises `TightfitError` for another base, other settings, and tensors that do not fit; nothing is changed then.
        """
        _refuse_other_base(model, config)
        if not _alike(_settings(config), model.side[self.name].settings):
            raise TightfitError(
                f"the file has other settings than the side network `{self.name}` that stands here",
                hint=f"its own: {', '.join(f'{key} {config[key]}' for key in ('reduction', 'downsample', 'rank'))}",
            )
        fill_learned(self.learned_state(model), state)

    def _check(self, model: nn.Module) -> None:
        if self.downsample not in DOWNSAMPLES:
            raise TightfitError(f"`side` has no downsampler `{self.downsample}`", hint=near(self.downsample, DOWNSAMPLES))
        if self.init not in INITS:
            raise TightfitError(f"`side:init` cannot be `{self.init}`", hint=near(self.init, INITS))
        if self.init == "base" and (self.reduction, self.downsample) != (1, "linear"):
            raise TightfitError(
                "`side:init=base` copies blocks as wide as they are", hint="add `reduction=1,downsample=linear`, or leave `init` out"
            )
        if self.rank < 1:
            raise TightfitError(f"`side:rank` is at least 1, not {self.rank}", hint="16 is the paper's")
        if not self.name.isidentifier() or self.name in dir(Sides):
            raise TightfitError(f"a side network cannot be called `{self.name}`", hint="letters, digits and underscores, such as `french`")
        if any("base_layer" in module._modules for module in model.modules()):
            raise TightfitError(
                "`side` cannot go with the adapters that this model has already",
                hint="one way of tuning at a time: leave `side` or `lora` out",
            )
        if "side" in model._modules and self.name in model.side:
            raise TightfitError(f"this model has a side network `{self.name}` already", hint="give the second one another `name`")


def activate(model: nn.Module, name: str | None) -> None:
    """Let the side network `name` take part from now on; None for the base alone. Raises `TightfitError` for an unknown one."""
    if name is not None and name not in model.side:
        raise TightfitError(f"no side network is called `{name}`", hint=near(name, list(model.side)))
    model.side.active = name


def load_side(model: nn.Module, config: Mapping[str, Any], state: Mapping[str, Tensor], name: str = "") -> None:
    """Put a learned side network (`learned_config`, `learned_state`) beside a live base as `name` or as it was called, and activate it.

    Raises `TightfitError` for another base, other settings than those of a side network of that name that stands there, and tensors
    that do not fit; nothing is changed then.
    """
    settings = _settings(config)
    settings = replace(settings, name=name or settings.name)
    _refuse_other_base(model, config)
    if not settings.learned_state(model):
        with torch.device("meta"):
            refuse_misfit(_state(model, SideNetwork(settings, *parts_of(model))), state)
        settings.apply(model)
    settings.load_learned(model, config, state)
    activate(model, settings.name)


def _state(model: nn.Module, side: SideNetwork) -> dict[str, Tensor]:
    own = {f"side.{path}": tensor.detach() for path, tensor in side.named_parameters()}
    return own | {f"head.{at}.{path}": tensor.detach() for at, head in trained_head(model) for path, tensor in head.named_parameters()}


def _settings(config: Mapping[str, Any]) -> Side:
    known = asdict(Side())
    if missing := sorted(key for key in known.keys() - config.keys()):
        raise TightfitError(f"the side network's config lacks `{missing[0]}`", hint="is its file whole?")
    return Side(**{key: config[key] for key in known})


def _alike(one: Side, other: Side) -> bool:
    """Whether the one's tensors mean the same in the other."""
    return replace(one, name=other.name, mix_rate=other.mix_rate, init=other.init) == other


def _refuse_other_base(model: nn.Module, config: Mapping[str, Any]) -> None:
    other = [f"{key} {config.get(key)} in place of {value}" for key, value in _shape(model).items() if config.get(key) != value]
    if other:
        raise TightfitError(
            f"this side network was made for another model: {'; '.join(other)}", hint="load it beside the base it was tuned on"
        )


def _shape(model: nn.Module) -> dict[str, Any]:
    inner, stack, width = parts_of(model)
    return {"architecture": type(model).__name__, "hidden_size": inner.config.hidden_size, "output_width": width, "blocks": len(stack)}
