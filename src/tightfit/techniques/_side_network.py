"""Side network: what stands beside a frozen model, and how the two run as one. The technique `side` puts it there.

It knows neither how it is trained nor in which file it is kept.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tightfit.describe.blocks import block_lists
from tightfit.describe.narrow import narrow_model
from tightfit.formats.linear import QuantizedLinear
from tightfit.formats.precision import in_given_precision
from tightfit.terms.errors import TightfitError

if TYPE_CHECKING:
    from tightfit.techniques.side import Side

_BASE_ONLY = {"input_ids", "inputs_embeds", "token_type_ids", "past_key_values", "use_cache", "return_dict", "output_hidden_states"}
"""Arguments of the base's forward pass that the side network gets in a form of its own, or not at all."""


class SideNetwork(nn.Module):
    """What stands beside the model: the narrow `network`, a `down`sampler for each block, the gates `gamma`, the mix `alpha`, and `up`."""

    def __init__(self, settings: "Side", inner: nn.Module, wide_blocks: nn.ModuleList, output_width: int) -> None:
        super().__init__()
        self.settings = settings
        self.rate_factors = {"alpha": settings.mix_rate, "gamma": settings.mix_rate}
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
        """First values, on `device`: transformers' own for the network, torch's for the rest; no gate leans to a side, a is one."""
        self.to_empty(device=device)
        for module in self.network.modules():
            self.network._init_weights(module)
        for module in [*self.down.modules(), self.up]:
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()
        self.gamma.zero_()
        self.alpha.fill_(1.0)

    @torch.no_grad()
    def copy_base(self, inner: nn.Module) -> None:
        """The base's blocks and last norm as first values, between a `linear` downsampler and an `up` that change nothing.

        For a network as wide as the base. Raises `TightfitError` where a weight of the base cannot be read: it streams, say.
        """
        if self.up.out_features != self.up.in_features:
            raise TightfitError("`side:init=base` cannot go with a base that projects its last hidden state", hint="leave `init` out")
        for path, module in self.network.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                value = _dense(inner.get_submodule(path), name)
                if value is None or value.shape != parameter.shape:
                    raise TightfitError(
                        f"`side:init=base` cannot read `{path}.{name}` of the base",
                        hint="leave `init` out where the base streams or its experts are quantized",
                    )
                parameter.copy_(value)
        for module in [*self.down.values(), self.up]:
            nn.init.eye_(module.weight)
        self.up.bias.zero_()


def _dense(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of the base as it computes; None where it is elsewhere."""
    if isinstance(module, QuantizedLinear) and name == "weight":
        if any(tensor.is_meta or tensor.numel() == 0 for tensor in module.stored):  # a streamed block holds empty ones
            return None
        value = module.dequantize(torch.float32)
        return value.T if module.transposed else value
    value = module._parameters.get(name)
    return None if value is None or value.is_meta else value


class Sides(nn.ModuleDict):
    """The side networks of one base by name. `active` is the one that takes part, or None; `path` is that of the base's stack."""

    beside: ClassVar[bool] = True

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.active: str | None = None


def combined(sides: Sides, inner: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
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


def _downsampler(settings: "Side", wide: int, narrow: int) -> nn.Module:
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


def freeze(model: nn.Module, inner: nn.Module, stack: nn.ModuleList) -> None:
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
