"""Steps: what one unit of work does, said once: rehearsed on fake tensors, measured on real ones. A run's loop is `generate`'s own."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tightfit.contracts import Paced
from tightfit.terms.errors import TightfitError, near

Mark = Any
"""A function that is told the name of the phase that begins: `mark("optimizer")`. The meter listens; a real run may ignore it."""


def silent(_phase: str) -> None:
    """A mark that nobody listens to."""


def new_cache(model: nn.Module) -> Any:
    """An empty KV cache as `generate` makes it; encoder–decoder models get one for self- and one for cross-attention."""
    from transformers import DynamicCache, EncoderDecoderCache

    if model.config.is_encoder_decoder:
        decoder = model.config.get_text_config(decoder=True)
        return EncoderDecoderCache(DynamicCache(config=decoder), DynamicCache(config=decoder))
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def greedy_pick(logits: Tensor) -> Tensor:
    """The likeliest next token from the logits of the last position, in float32 as `generate` does.  # (batch, 1, vocab) → (batch, 1)"""
    return logits[:, -1, :].to(copy=True, dtype=torch.float32).argmax(dim=-1, keepdim=True)


def prefill(model: nn.Module, tokens: Tensor, cache: Any, **inputs: Any) -> Tensor:
    """Read the whole prompt, fill `cache`, and pick the first new token.  # tokens: (batch, prompt) → (batch, 1)"""
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    output = model(**{name: tokens}, past_key_values=cache, use_cache=True, **last_logits_only(model), **inputs)
    return greedy_pick(output.logits)


def last_logits_only(model: nn.Module) -> dict[str, int]:
    """`logits_to_keep=1` for models that can skip the head on all but the last position, as `generate` passes it."""
    return {"logits_to_keep": 1} if _takes(model, "logits_to_keep") else {}


def decode(model: nn.Module, token: Tensor, cache: Any, **inputs: Any) -> Tensor:
    """Write one token against a cache that holds all before it.  # token: (batch, 1) → (batch, 1)"""
    return prefill(model, token, cache, **inputs)


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """One forward pass without a cache."""
    return model(**batch, **without_cache(model))


def make_optimizer(model: nn.Module, name: str = "adamw", learning_rate: float = 1e-4, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters. `adamw` is torch's fused one, which needs no temporary copies.

    Parameters whose module asks for another learning rate (`Paced`) get it; biases, norms and such scalars do not decay.
    """
    if name != "adamw":
        raise TightfitError(f"no optimizer is called `{name}`", hint=near(name, ["adamw"]))
    groups: dict[tuple[float, float], dict[int, nn.Parameter]] = {}
    for module in model.modules():
        factors = module.rate_factors if isinstance(module, Paced) else {}
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                decay = 0.0 if own in factors or own.endswith("bias") or "Norm" in type(module).__name__ else weight_decay
                pace = (learning_rate * factors.get(own, 1.0), decay)
                groups.setdefault(pace, {})[id(parameter)] = parameter  # a tied one comes once
    if not groups:
        raise TightfitError("nothing of this model is trained", hint="add `--technique lora`, or another that trains something")
    described = [{"params": [*found.values()], "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]
    return torch.optim.AdamW(described, fused=True)


def backward(
    model: nn.Module, batch: dict[str, Tensor], share: float = 1.0, precision: str = "no", mark: Mark = silent, run: Any = Tensor.backward
) -> Tensor:
    """One pass forward and backward, whose loss counts as `share` of the whole; gradients add up. Returns the detached share.

    With `precision` `bf16` products are computed in it, whatever the weights are stored in.
    """
    with torch.autocast(batch_device(batch).type, torch.bfloat16, enabled=precision == "bf16"):
        loss = loss_of(model, batch)
    if share != 1.0:
        loss = loss * share
    mark("backward: head")
    run(loss)
    return loss.detach()


def update(optimizer: torch.optim.Optimizer) -> None:
    """The trainable parameters move, and their gradients are given up."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train_step(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, mark: Mark = silent) -> Tensor:
    """Forward, loss, backward, update. Returns the detached loss."""
    loss = backward(model, batch, mark=mark)
    mark("optimizer")
    update(optimizer)
    return loss


def batch_device(batch: dict[str, Tensor]) -> torch.device:
    """Where the inputs lie."""
    return next(iter(batch.values())).device


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's own loss where it has a head; the mean square of its last hidden state where it has none (an encoder alone)."""
    output = embed(model, batch)
    if "loss" in output and output.loss is not None:
        return output.loss
    return output.last_hidden_state.float().square().mean()


def without_cache(model: nn.Module, among_others: bool = False) -> dict[str, bool]:
    """The argument that keeps no keys and values, for models that would; `among_others`: also for those that take arguments of any name."""
    return {"use_cache": False} if _takes(model, "use_cache", among_others) else {}


def _takes(model: nn.Module, argument: str, among_others: bool = False) -> bool:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    parameters = inspect.signature(type(inner).forward).parameters
    return argument in parameters or (among_others and any(each.kind is each.VAR_KEYWORD for each in parameters.values()))
