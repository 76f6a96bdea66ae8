"""Narrow: a model of the same architecture as another, whose widths are a fraction of the other's, without embeddings of its own."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.describe.blocks import block_lists
from tightfit.terms.errors import TightfitError

WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_hidden_size",
    "hidden_dim",
)
"""Names under which configs keep a width of the residual stream or of a feed-forward layer; attention's are worked out from the heads."""

REDUCTIONS = (2, 4, 8, 16, 32, 64)
"""What a hint tries."""


def narrow_model(inner: nn.Module, reduction: int) -> nn.Module:
    """A model of the class of `inner`, in 32 bits and as deep, with every width divided by `reduction`.

    It takes `inputs_embeds` of its own width, has neither embeddings nor pooler, and hands its first block what it takes.
    Raises `TightfitError` where the architecture has no such form.
    """
    config = narrowed(inner.config, reduction)
    if "flash" in (config._attn_implementation or ""):
        config._attn_implementation = "sdpa"  # which takes heads of any width
    if "layerdrop" in config.to_dict():
        config.layerdrop = 0.0
    try:
        narrow = type(inner)._from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError) as error:
        raise TightfitError(
            f"there is no narrow `{type(inner).__name__}`: {str(error).splitlines()[0]}", hint="try another `reduction`"
        ) from error
    if "pooler" in narrow._modules:
        narrow.pooler = None
    for path, module in _embeddings(narrow):
        narrow.set_submodule(path, _Skipped(adds=isinstance(module, nn.Embedding)))
    return narrow


def _embeddings(narrow: nn.Module) -> list[tuple[str, nn.Module]]:
    """What turns ids into the first block's input, by type or name: the outermost modules that hold parameters."""
    inside = tuple(f"{path}." for path, _ in block_lists(narrow))
    found: list[tuple[str, nn.Module]] = []
    for path, module in narrow.named_modules():
        named = isinstance(module, nn.Embedding) or "embed" in path.rpartition(".")[2]
        outer = (*inside, *(f"{above}." for above, _ in found))
        if named and not path.startswith(outer) and next(module.parameters(), None) is not None:
            found.append((path, module))
    if any(path.rpartition(".")[2].startswith("rel") for path, _ in found):
        raise TightfitError(
            f"there is no narrow `{type(narrow).__name__}`: its blocks read relative positions from outside",
            hint="a model with rotary, learned or linear positions can be narrowed",
        )
    return found


def narrowed(config: Any, reduction: int) -> Any:
    """A copy of `config` with every width divided by `reduction`.

    The heads stay as many while each keeps a whole width, even where it is rotated; else they become fewer, in the same groups.
    Raises `TightfitError` where the width cannot be divided, with the reductions that can.
    """
    values = config.to_dict()
    if not {"num_attention_heads"} & {*values, *config.attribute_map} or "kv_lora_rank" in values:
        raise TightfitError(f"`{config.model_type}` has no narrower form", hint="attention in heads of one width is wanted")
    if reduction < 1 or _heads(config, values, reduction) is None:
        working = [str(other) for other in REDUCTIONS if _heads(config, values, other)]
        raise TightfitError(
            f"a width of {config.hidden_size} in {config.num_attention_heads} heads cannot be divided by {reduction}",
            hint=f"reductions that work: {', '.join(working)}" if working else "this architecture has no narrower form",
        )
    heads, head_width = _heads(config, values, reduction) or (1, 1)
    narrow = copy.deepcopy(config)
    changes: dict[str, Any] = {name: max(1, values[name] // reduction) for name in WIDTHS if values.get(name)}
    changes |= {"hidden_size": config.hidden_size // reduction, "num_attention_heads": heads}
    if values.get("num_key_value_heads"):
        changes["num_key_value_heads"] = heads * config.num_key_value_heads // config.num_attention_heads
    if values.get("head_dim"):
        changes["head_dim"] = head_width
    if values.get("word_embed_proj_dim"):
        changes["word_embed_proj_dim"] = changes["hidden_size"]  # what comes in has the width of the blocks
    if values.get("rotary_dim"):
        changes["rotary_dim"] = values["rotary_dim"] * head_width // _head_width(config, values)
    for name, value in changes.items():
        setattr(narrow, name, value)
    return narrow


def _heads(config: Any, values: dict[str, Any], reduction: int) -> tuple[int, int] | None:
    """How many heads, and how wide each: the most that are not more than the wide model has. None where no number fits."""
    wide, heads = _head_width(config, values), config.num_attention_heads
    groups = heads // (values.get("num_key_value_heads") or heads)
    total = heads * wide // reduction
    if config.hidden_size % reduction or (heads * wide) % reduction:
        return None
    for count in range(heads, 0, -1):
        if total % count == 0 and count % groups == 0 and _rotates(values, wide, total // count):
            return count, total // count
    return None


def _head_width(config: Any, values: dict[str, Any]) -> int:
    return values.get("head_dim") or config.hidden_size // config.num_attention_heads


def _rotates(values: dict[str, Any], wide: int, width: int) -> bool:
    """Rotary embeddings turn pairs; a head without them may have any width."""
    if values.get("rotary_dim"):
        turned = [values["rotary_dim"] * width // wide]
    else:
        rope = values.get("rope_parameters") or {}
        kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope] * bool(rope)
        turned = [int(width * kind.get("partial_rotary_factor", 1.0)) for kind in kinds]
    return all(dims >= 2 and dims % 2 == 0 for dims in turned)


class _Skipped(nn.Module):
    """In place of an embedding in a narrow model: hands on what is there, or adds nothing."""

    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.adds = adds

    def forward(self, *given: Any, inputs_embeds: Any = None, **_kwargs: Any) -> Tensor:
        """# (batch, tokens, d / r) → the same; of positions → ()"""
        hidden = next(tensor for tensor in (inputs_embeds, *given) if tensor is not None)
        return hidden.new_zeros(()) if self.adds else hidden
