"""Side state: take what tuning a side network changed out of a model, and put it beside a base again. Knows no files."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.techniques.side import Side, SideNetwork, activate, parts_of, trained_head
from tightfit.terms.errors import TightfitError


def side_config(model: nn.Module, name: str = "default") -> dict[str, Any]:
    """What `load_side` needs to know beside the tensors: the settings, and the shape of the base. Plain values."""
    return asdict(model.side[name].settings) | _shape(model)


def side_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """What tuning changes: the tensors of the side network under `side.`, those of a trained head under `head.`."""
    side = {f"side.{path}": tensor.detach() for path, tensor in model.side[name].named_parameters()}
    return side | {f"head.{at}.{path}": tensor.detach() for at, head in trained_head(model) for path, tensor in head.named_parameters()}


@torch.no_grad()
def load_side(model: nn.Module, config: Mapping[str, Any], state: Mapping[str, Tensor], name: str = "") -> None:
    """Put a side network (`side_config`, `side_state`) beside the base as `name` or as it was called, and activate it.

    Raises `TightfitError` for another base, other settings than those of a side network of that name, and missing, unknown
    or misshapen tensors; nothing is changed then.
    """
    settings = Side(**{key: config[key] for key in asdict(Side())} | ({"name": name} if name else {}))
    other = [f"{key} {config.get(key)} in place of {value}" for key, value in _shape(model).items() if config.get(key) != value]
    here = model._modules.get("side", {})
    if settings.name in here and here[settings.name].settings != settings:
        other.append(f"other settings than the side network `{settings.name}` that stands here")
    if other:
        raise TightfitError(
            f"this side network was made for another model: {'; '.join(other)}", hint="load it beside the base it was tuned on"
        )
    with torch.device("meta"):
        blank = SideNetwork(settings, *parts_of(model))
    wanted = {f"side.{path}": tensor.shape for path, tensor in blank.named_parameters()}
    wanted |= {f"head.{at}.{path}": tensor.shape for at, head in trained_head(model) for path, tensor in head.named_parameters()}
    wrong = sorted(key for key in wanted.keys() | state.keys() if key not in wanted or key not in state or wanted[key] != state[key].shape)
    if wrong:
        raise TightfitError(f"the side network's tensors do not fit: `{wrong[0]}` and {len(wrong) - 1} more", hint="is its file whole?")
    if settings.name not in here:
        settings.apply(model)
    for key, tensor in side_state(model, settings.name).items():
        tensor.copy_(state[key])
    activate(model, settings.name)


def _shape(model: nn.Module) -> dict[str, Any]:
    inner, stack, width = parts_of(model)
    return {"architecture": type(model).__name__, "hidden_size": inner.config.hidden_size, "output_width": width, "blocks": len(stack)}
