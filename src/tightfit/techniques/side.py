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
*Paper*: Zhang et al. 2024, Quantized Side Tuning (ACL), section 3. As in its released code and its table of parameters, one
downsampler a block, the first of which serves the embedding too; unlike the code, a and gamma are the paper's scalars.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tightfit.contracts import Quality, Stage
from tightfit.describe.blocks import block_lists
from tightfit.describe.narrow import narrow_model
from tightfit.formats.precision import in_given_precision
from tightfit.terms.errors import TightfitError, near

DOWNSAMPLES = ("adapter", "lora", "linear", "max_pool", "avg_pool")

_BASE_ONLY = {"input_ids", "inputs_embeds", "token_type_ids", "past_key_values", "use_cache", "return_dict", "output_hidden_states"}
"""Arguments of the base's forward pass that the side network gets in a form of its own, or not at all."""


class SideNetwork(nn.Module):
    """What stands beside the model: the narrow `network`, a `down`sampler for each block, the gates `gamma`, the mix `alpha`, and `up`."""

    def __init__(self, settings: "Side", inner: nn.Module, wide_blocks: nn.ModuleList, output_width: int) -> None:
        super().__init__()
        self.settings = settings
        self.network = narrow_model(inner, settings.reduction)
        self.path = block_lists(self.network)[0][0]
        wide, narrow = inner.config.hidden_size, self.network.config.hidden_size
        self.down = nn.ModuleDict({str(at): _downsampler(settings, wide, narrow) for at in range(len(wide_blocks))})
        self.gamma = nn.Parameter(torch.empty(len(wide_blocks)))
        self.alpha = nn.Parameter(torch.empty(()))
        self.up = nn.Linear(narrow, output_width)
        for module in [*self.down.values(), self.up, *_outside_blocks(self.network, self.path)]:
            module.forward = partial(in_given_precision, module, module.forward)
        for block in self.blocks:
            block.forward = partial(_gated, partial(in_given_precision, block, block.forward))

    @property
    def blocks(self) -> Any:
        """The narrow blocks."""
        return self.network.get_submodule(self.path)

    def forward(self, taps: list[Tensor], cache: Any, **context: Any) -> Tensor:
        """The side's contribution from the downsampled embedding and blocks.  # blocks + 1 times (batch, tokens, d / r) → (…, d)"""
        with ExitStack() as hooks:
            for at, block in enumerate(self.blocks):
                feed = partial(_feed, taps[0] if at == 0 else None, taps[at + 1], torch.sigmoid(self.gamma[at]))
                hooks.callback(block.register_forward_pre_hook(feed, with_kwargs=True).remove)
            output = self.network(inputs_embeds=taps[0], past_key_values=cache, use_cache=cache is not None, return_dict=True, **context)
        return self.up(output.last_hidden_state)

    @torch.no_grad()
    def fill(self, device: torch.device) -> None:
        """First values, on `device`: transformers' own for the network, torch's for the rest; no gate leans to a side, and a is one."""
        self.to_empty(device=device)
        for module in self.network.modules():
            self.network._init_weights(module)
        for module in [*self.down.modules(), self.up]:
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()
        self.gamma.zero_()
        self.alpha.fill_(1.0)


class Sides(nn.ModuleDict):
    """The side networks of one base by name. `active` is the one that takes part, or None; `path` is that of the base's stack."""

    beside: ClassVar[bool] = True

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.active: str | None = None


@dataclass(frozen=True)
class Side:
    """A narrow network beside the frozen model."""

    stage: ClassVar[Stage] = Stage.ADAPT
    quality: ClassVar[Quality] = "exact"

    reduction: int = 16  # the side's width is d / reduction; 2 to 64 fit alike in the paper, memory falls until 16 and little after
    downsample: str = "adapter"  # or lora, linear, max_pool, avg_pool; only the pools keep no hidden state of full width
    rank: int = 16  # of `adapter` and `lora`; parameters grow by blocks · rank · d
    name: str = "default"  # of the side network; others may stand beside the same base, each + its own weights

    def apply(self, model: nn.Module) -> None:
        """Freeze the model and put a side network at `model.side`. On `meta` it is empty too; `initialise` fills it later."""
        self._check(model)
        inner, stack, _ = parts = parts_of(model)
        on_meta = all(parameter.is_meta for parameter in model.parameters())
        with torch.device("meta"):
            side = SideNetwork(self, *parts)
        if "side" not in model._modules:
            _freeze(model, inner, stack)
            model.side = Sides(next(path for path, module in inner.named_modules() if module is stack))
            inner.forward = partial(_combined, model.side, inner, inner.forward)
        side.train(model.training)
        model.side[self.name] = side
        activate(model, self.name)
        if not on_meta:
            self.initialise(model)

    def initialise(self, model: nn.Module) -> None:
        """Give the side network its first values, where the model's embedding lies."""
        model.side[self.name].fill(model.get_input_embeddings().weight.device)

    def _check(self, model: nn.Module) -> None:
        if self.downsample not in DOWNSAMPLES:
            raise TightfitError(f"`side` has no downsampler `{self.downsample}`", hint=near(self.downsample, DOWNSAMPLES))
        if self.rank < 1:
            raise TightfitError(f"`side:rank` is at least 1, not {self.rank}", hint="16 is the paper's")
        if not self.name.isidentifier() or self.name in dir(Sides):
            raise TightfitError(f"a side network cannot be called `{self.name}`", hint="letters, digits and underscores, such as `french`")
        if "side" in model._modules and self.name in model.side:
            raise TightfitError(f"this model has a side network `{self.name}` already", hint="give the second one another `name`")


def activate(model: nn.Module, name: str | None) -> None:
    """Let the side network `name` take part from now on; None for the base alone. Raises `TightfitError` for an unknown one."""
    if name is not None and name not in model.side:
        raise TightfitError(f"no side network is called `{name}`", hint=near(name, list(model.side)))
    model.side.active = name


def _combined(sides: Sides, inner: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """The base without gradients, then the side, then both."""
    if sides.active is None:
        return forward(*args, **kwargs)
    side, given = sides[sides.active], _by_name(inner, args, kwargs)
    cache = given.get("past_key_values")
    was_empty = cache is None or cache.get_seq_length() == 0
    mode, inner.training = inner.training, False
    try:
        with _tapping(side, inner.get_submodule(sides.path)) as taps, torch.no_grad():
            output = forward(**given | {"return_dict": True})
    finally:
        inner.training = mode
    if len(taps) != len(side.blocks) + 1:
        raise TightfitError(f"{len(side.blocks)} blocks ran {len(taps) - 1} times; `side` wants each to run once")
    cache = output.get("past_key_values")
    own = None if cache is None else _side_cache(cache, side, sides.active, was_empty)
    addition = side(taps, own, **{name: value for name, value in given.items() if name not in _BASE_ONLY})
    base = output.last_hidden_state
    output.last_hidden_state = base + (1 - side.alpha) * (addition - base)  # the paper's sum, exact at 1 and fine near it in 16 bits
    if output.get("pooler_output") is not None:
        output.pooler_output = inner.pooler(output.last_hidden_state)
    return output


def _by_name(inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, however they were passed."""
    signature = inspect.signature(type(inner).forward)
    given = dict(signature.bind_partial(inner, *args, **kwargs).arguments)
    last = list(signature.parameters.values())[-1]
    given |= given.pop(last.name, {}) if last.kind is last.VAR_KEYWORD else {}
    return {name: value for name, value in given.items() if name != "self"}


@contextmanager
def _tapping(side: SideNetwork, stack: Any) -> Iterator[list[Tensor]]:
    """Downsample what enters the first block and what leaves each, and collect it.

    At once, so that a full hidden state lives on only where a downsampler learns from it; the side runs later, since what a base
    block takes while it computes is more than the downsampled states.
    """
    taps: list[Tensor] = []
    learns = torch.is_grad_enabled()

    def tap(at: int, hidden: Tensor) -> None:
        with torch.set_grad_enabled(learns):
            taps.append(side.down[str(at)](hidden))

    def before(_block: Any, args: Any, kwargs: Any) -> None:
        tap(0, args[0] if args else kwargs["hidden_states"])

    def after(at: int, _block: Any, _args: Any, output: Any) -> None:
        tap(at, output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        hooks.callback(stack[0].register_forward_pre_hook(before, with_kwargs=True).remove)
        for at, block in enumerate(stack):
            hooks.callback(block.register_forward_hook(partial(after, at)).remove)
        yield taps


def _feed(first: Tensor | None, tapped: Tensor, gate: Tensor, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hand a side block what was tapped, and the first one the embedding in place of what the narrow model made of it."""
    kwargs = kwargs | {"tapped": tapped, "gate": gate}
    if args:
        return (args[0] if first is None else first, *args[1:]), kwargs
    return args, kwargs if first is None else kwargs | {"hidden_states": first}


def _gated(forward: Any, hidden_states: Tensor, *args: Any, tapped: Tensor, gate: Tensor, **kwargs: Any) -> Any:
    """Inside the block's forward, so that `recompute` keeps no mixture.  # hidden, tapped: (batch, tokens, d / r); gate: ()"""
    return forward((1 - gate) * tapped + gate * hidden_states, *args, **kwargs)


def _side_cache(cache: Any, side: SideNetwork, name: str, was_empty: bool) -> Any:
    """The side's layers lie behind the base's in the same cache, so that whoever reorders, crops or copies it does so to both."""
    from transformers import DynamicCache

    if not isinstance(cache, DynamicCache):
        raise TightfitError(f"`side` cannot write into a `{type(cache).__name__}`", hint="leave `cache_implementation` out")
    own = DynamicCache(config=side.network.config)
    if "side" not in vars(cache) and was_empty:
        cache.layers.extend(own.layers)
        cache.side = name
    if vars(cache).get("side") != name:
        raise TightfitError(f"the cache was filled without the side network `{name}`", hint="begin with an empty cache")
    own.layers = cache.layers[-len(own.layers) :]
    return own


def _downsampler(settings: Side, wide: int, narrow: int) -> nn.Module:
    """# (…, wide) → (…, narrow)"""
    if settings.downsample in ("max_pool", "avg_pool"):
        return (nn.MaxPool1d if settings.downsample == "max_pool" else nn.AvgPool1d)(settings.reduction)  # windows of neighbours in d
    if settings.downsample == "linear":
        return nn.Linear(wide, narrow, bias=False)
    first, second = nn.Linear(wide, settings.rank, bias=False), nn.Linear(settings.rank, narrow, bias=False)
    return nn.Sequential(first, second) if settings.downsample == "lora" else nn.Sequential(first, nn.SiLU(), second, nn.LayerNorm(narrow))


def _outside_blocks(network: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules of the narrow network that hold parameters and belong to no block: its last norm."""
    for at, module in network.named_modules():
        if not at.startswith(f"{path}.") and next(module.parameters(recurse=False), None) is not None:
            yield module


def _freeze(model: nn.Module, inner: nn.Module, stack: nn.ModuleList) -> None:
    """All but a head that predicts no tokens. The base stays as in evaluation: a dropped block would feed nothing."""
    model.requires_grad_(False)
    for module in [*inner.children(), *stack]:
        module.eval()
        module.train = partial(_stay, module)
    for _, module in trained_head(model):
        module.float().requires_grad_(True)
        module.forward = partial(in_given_precision, module, module.forward)


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """In place of `module.train`."""
    return module


def trained_head(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What is trained beside the side: a head that predicts no tokens."""
    if model.base_model is model or model.get_output_embeddings() is not None:
        return []
    around = [(name, module) for name, module in model.named_children() if module is not model.base_model and name != "side"]
    return [(name, module) for name, module in around if next(module.parameters(), None) is not None]


def parts_of(model: nn.Module) -> tuple[nn.Module, nn.ModuleList, int]:
    """The model that runs the only stack of blocks, that stack, and the width of its last hidden state, which OPT may project.

    Raises `TightfitError` for models of another build, such as encoder-decoders and those that read pixels.
    """
    from transformers import PreTrainedModel  # here, since naming a technique loads no library

    stacks = [(path, stack) for path, stack in block_lists(model) if not path.startswith("side.")]
    if len(stacks) == 1 and not model.config.is_encoder_decoder:
        (path, stack), *_ = stacks
        owners = [
            module
            for at, module in model.named_modules()
            if isinstance(module, PreTrainedModel) and path.startswith(f"{at}." if at else "")
        ]
        if "inputs_embeds" in inspect.signature(type(owners[-1]).forward).parameters:
            config = owners[-1].config
            return owners[-1], stack, config.to_dict().get("word_embed_proj_dim") or config.hidden_size
    raise TightfitError(
        f"`side` cannot stand beside `{type(model).__name__}`",
        hint="it takes text models with one stack of blocks: decoders such as Llama, encoders such as BERT",
    )
