"""Rehearsal: the very step that will run, on fake tensors under the meter, at two depths, extended to any depth.

Blocks repeat, so each phase's bytes are linear in the number of blocks of each kind. Two blocks of every kind are
rehearsed, then one more of each kind in turn; the differences extend every phase by itself, because which phase holds the
peak changes with depth and length.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tightfit import steps
from tightfit.contracts import Transform
from tightfit.describe.blocks import block_lists, signature
from tightfit.rehearse.fake import convertible_modules, empty_like_on_cpu, inputs_for, materialize, one_sequence_per_row
from tightfit.rehearse.meter import Meter
from tightfit.rehearse.stand_in import standing_in
from tightfit.terms.footprint import Footprint, combine
from tightfit.terms.workload import Workload

_AT_LEAST = 2
"""Blocks of one kind that are rehearsed: the first and the last differ (first copies, last gradients), those between do not."""


def rehearse(make_model: Callable[[], nn.Module], workload: Workload, techniques: Iterable[Transform] = ()) -> Footprint:
    """Predict the bytes and operations of `workload` on a model of any depth.

    `make_model` builds the model on `meta`; it is called for every rehearsed depth, since techniques change their model.
    """
    techniques = sorted(techniques, key=lambda technique: technique.stage)
    kinds = _kinds(make_model())
    counts = Counter(kind for stack in kinds for kind in stack)
    fewest = {kind: min(_AT_LEAST, count) for kind, count in counts.items()}
    base = rehearse_whole(_thinned(make_model(), kinds, fewest), workload, techniques)
    result = base
    for kind, count in counts.items():
        if count > fewest[kind]:
            deeper = rehearse_whole(_thinned(make_model(), kinds, fewest | {kind: fewest[kind] + 1}), workload, techniques)
            result = _extend(result, base, deeper, count - fewest[kind])
    return result


def rehearse_whole(model: nn.Module, workload: Workload, techniques: Iterable[Transform] = ()) -> Footprint:
    """Predict by running every block of the `meta` model `model` on fake tensors."""
    with torch.device("meta"):
        for technique in techniques:
            technique.apply(model)
    with FakeTensorMode(), one_sequence_per_row(), convertible_modules(), standing_in(model), ExitStack() as hooks:
        materialize(model, empty_like_on_cpu)
        batch = inputs_for(model, workload)
        return measure(model, batch, workload, hooks)


def measure(model: nn.Module, batch: dict[str, Any], workload: Workload, hooks: ExitStack) -> Footprint:
    """Run `workload` once under the meter. Real tensors or fake ones: the same code."""
    meter = Meter()
    meter.adopt([*model.parameters(), *model.buffers()], "weights")
    meter.adopt(batch.values(), "activations")
    _watch_blocks(model, meter, hooks)
    with meter:
        {"generate": _generate, "tune": _tune, "embed": _embed}[workload.task](model, batch, workload, meter)
    return meter.footprint()


def _generate(model: nn.Module, batch: dict[str, Any], workload: Workload, meter: Meter) -> None:
    """The two phases of generation: the whole prompt, then one token against a full cache."""
    with torch.no_grad():
        cache, inputs, tokens = steps.new_cache(model), {}, batch["input_ids"]
        if model.config.is_encoder_decoder:
            meter.enter("encoder")
            inputs = {"encoder_outputs": model.get_encoder()(input_ids=tokens)}
            tokens = tokens[:, :1].clone()
        _watch_cache(cache, meter)
        meter.enter("prefill")
        token = steps.prefill(model, tokens, cache, **inputs)
        if workload.new_tokens > 1:
            _fill(cache, tokens.shape[1] + workload.new_tokens - 2, meter)
            meter.enter("decode")
            steps.decode(model, token, cache, **inputs)


def _tune(model: nn.Module, batch: dict[str, Any], workload: Workload, meter: Meter) -> None:
    """The second step of training: the first only makes the optimizer's state, which every later step finds there."""
    model.train()
    optimizer = steps.make_optimizer(model, workload.optimizer)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            parameter.register_post_accumulate_grad_hook(lambda owner: meter.adopt([owner.grad], "gradients"))
    meter.enter("start")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    meter.adopt((value for state in optimizer.state.values() for value in state.values()), "optimizer")
    meter.restart()
    meter.enter("forward")
    steps.train_step(model, batch, optimizer, mark=meter.enter)


def _embed(model: nn.Module, batch: dict[str, Any], workload: Workload, meter: Meter) -> None:
    with torch.no_grad():
        meter.enter("forward")
        steps.embed(model, batch)


def _watch_cache(cache: Any, meter: Meter) -> None:
    """Tag what the cache keeps as `kv_cache`, right after each layer was updated."""
    update = cache.update

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = update(*args, **kwargs)
        meter.adopt(_cache_tensors(cache), "kv_cache")
        return result

    cache.update = watched
    for part in ("self_attention_cache", "cross_attention_cache"):
        if part in vars(cache):
            _watch_cache(getattr(cache, part), meter)


def _cache_tensors(cache: Any) -> Iterable[Any]:
    for layer in getattr(cache, "layers", ()):
        if layer.is_initialized:
            yield from (layer.keys, layer.values)


def _fill(cache: Any, length: int, meter: Meter) -> None:
    """Let the cache hold `length` tokens, as it does before the last one is written. Contents do not matter here."""
    cache = vars(cache).get("self_attention_cache", cache)
    for layer in cache.layers:
        if layer.is_initialized:
            kept = min(length, layer.sliding_window - 1) if layer.is_sliding else length
            batch, heads, _, width = layer.keys.shape
            layer.keys = layer.keys.new_zeros(batch, heads, kept, width)
            layer.values = layer.values.new_zeros(batch, heads, kept, layer.values.shape[-1])
            if layer.is_sliding:
                layer.cumulative_length = length
    meter.adopt(_cache_tensors(cache), "kv_cache")


def _watch_blocks(model: nn.Module, meter: Meter, hooks: ExitStack) -> None:
    """Name the phases: before, first block, later blocks, after; in the backward pass likewise, in reverse."""
    for number, (_, stack) in enumerate(block_lists(model)):
        last = len(stack) - 1
        for index, block in enumerate(stack):
            name = f"stack {number} " + ("first block" if index == 0 else "last block" if index == last else "blocks")

            def before(_module: Any, _args: Any, name: str = name) -> None:
                if not meter.phase.startswith(("backward", "optimizer")):
                    meter.enter(f"{_stem(meter.phase)}: {name}")

            def after(_module: Any, _args: Any, output: Any, name: str = name, ends: bool = index == last) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                if hidden.requires_grad and not meter.phase.startswith("backward"):
                    hidden.register_hook(lambda _grad: meter.enter(f"backward: {name}"))
                if ends and not meter.phase.startswith("backward"):
                    meter.enter(f"{_stem(meter.phase)}: after stack")

            hooks.callback(block.register_forward_pre_hook(before).remove)
            hooks.callback(block.register_forward_hook(after).remove)


def _stem(phase: str) -> str:
    return phase.split(":")[0]


def _kinds(model: nn.Module) -> list[list[tuple[int, Any]]]:
    """For each stack, each block's kind: the stack's number and the block's signature."""
    return [[(number, signature(block)) for block in stack] for number, (_, stack) in enumerate(block_lists(model))]


def _thinned(model: nn.Module, kinds: list[list[Any]], keep: dict[Any, int]) -> nn.Module:
    """`model` with only the first `keep[kind]` blocks of every kind, in their order."""
    left = dict(keep)
    for (path, stack), stack_kinds in zip(block_lists(model), kinds, strict=True):
        kept = []
        for block, kind in zip(stack, stack_kinds, strict=True):
            if left[kind] > 0:
                left[kind] -= 1
                kept.append(block)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.ModuleList(kept))
    return model


def _extend(result: Footprint, base: Footprint, deeper: Footprint, more: int) -> Footprint:
    """Add `more` blocks of the kind that `deeper` has one more of than `base`.

    Bytes: only phases that `base` has too; those of the blocks between the first and the last never hold the peak alone.
    """
    return Footprint(
        phases={
            name: combine([(1, parts), (more, deeper.phases[name]), (-more, base.phases[name])]) for name, parts in result.phases.items()
        },
        work={
            name: combine([(1, result.work.get(name, {})), (more, work), (-more, base.work.get(name, {}))])
            for name, work in deeper.work.items()
        },
    )
