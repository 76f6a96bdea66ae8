"""Rehearsal: the very step that will run, on fake tensors under the meter, with few blocks, extended to any depth.

Blocks repeat, so each phase's bytes are linear in the number of blocks of each kind. The landmarks of every stack are rehearsed
(`thin.py`), then one more block of each group in turn; the differences extend every phase by itself, because which phase holds
the peak changes with depth and length. Techniques change the whole model before it is thinned, so they see every block in its place.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tightfit import steps
from tightfit.contracts import Transform
from tightfit.describe.blocks import block_lists, signature
from tightfit.rehearse.fake import convertible_modules, fake_on_cpu, inputs_for, materialize, one_sequence_per_row
from tightfit.rehearse.meter import Meter
from tightfit.rehearse.stand_in import standing_in
from tightfit.rehearse.thin import names_of, plan_of, thinned
from tightfit.terms.errors import TightfitError
from tightfit.terms.footprint import Footprint, combine
from tightfit.terms.workload import Workload


def rehearse(make_model: Callable[[], nn.Module], workload: Workload, techniques: Iterable[Transform] = ()) -> Footprint:
    """Predict the bytes and operations of `workload` on a model of any depth.

    `make_model` builds the model on `meta`; it is called once, and the techniques change what it gives.
    """
    model = make_model()
    _apply(model, techniques)
    kinds = [[signature(block) for block in stack] for _, stack in block_lists(model)]
    kept, further = plan_of(kinds)
    base = result = _rehearsed(thinned(model, kept), workload)
    for number, deeper in further:
        result = _extend(result, base, _rehearsed(thinned(model, deeper), workload), number)
    return result


def rehearse_whole(model: nn.Module, workload: Workload, techniques: Iterable[Transform] = ()) -> Footprint:
    """Predict by running every block of the `meta` model `model` on fake tensors."""
    _apply(model, techniques)
    return _rehearsed(model, workload)


def _apply(model: nn.Module, techniques: Iterable[Transform]) -> None:
    with torch.device("meta"):
        for technique in sorted(techniques, key=lambda technique: technique.stage):
            technique.apply(model)


def _rehearsed(model: nn.Module, workload: Workload) -> Footprint:
    mode = FakeTensorMode()
    materialize(model, lambda tensor: fake_on_cpu(tensor, mode))
    with mode, one_sequence_per_row(), convertible_modules(), standing_in(model), ExitStack() as hooks:
        try:
            return measure(model, inputs_for(model, workload), workload, hooks)
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            raise TightfitError(
                f"{workload.rows} × {workload.context} tokens make tensors of more bytes than can be counted",
                hint="ask for a smaller `--context` or `--batch`",
            ) from error


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
    with torch.no_grad(), ExitStack() as hooks:
        cache, inputs, tokens = steps.new_cache(model), {}, batch["input_ids"]
        if model.config.is_encoder_decoder:
            meter.enter("encoder")
            inputs = {"encoder_outputs": model.get_encoder()(input_ids=tokens)}
            tokens = tokens[:, :1].clone()
        _watch_cache(cache, meter, hooks)
        meter.enter("prefill")
        token = steps.prefill(model, tokens, cache, **inputs)
        if workload.new_tokens > 1:
            _fill(cache, tokens.shape[1] + workload.new_tokens - 2, meter)
            meter.enter("decode")
            steps.decode(model, token, cache, **inputs)


def _tune(model: nn.Module, batch: dict[str, Any], workload: Workload, meter: Meter) -> None:
    """The second step of training: the first only makes the optimizer's state, which every later step finds there.

    Of a batch that goes through in several passes the last is measured, which finds the gradients of those before it.
    """
    model.train()
    optimizer = steps.make_optimizer(model, workload.optimizer)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            parameter.register_post_accumulate_grad_hook(lambda owner: meter.adopt([owner.grad], "gradients"))
    meter.enter("start")
    steps.update(optimizer)
    meter.adopt((value for state in optimizer.state.values() for value in state.values()), "optimizer")
    if workload.passes > 1:
        steps.backward(model, batch, 1 / workload.passes, workload.precision)
    meter.restart()
    meter.enter("forward")
    steps.backward(model, batch, 1 / workload.passes, workload.precision, meter.enter)
    meter.enter("optimizer")
    steps.update(optimizer)


def _embed(model: nn.Module, batch: dict[str, Any], workload: Workload, meter: Meter) -> None:
    with torch.no_grad():
        meter.enter("forward")
        steps.embed(model, batch)


def _watch_cache(cache: Any, meter: Meter, hooks: ExitStack) -> None:
    """Tag what the cache keeps as `kv_cache`, right after each layer was updated."""
    update = cache.update

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = update(*args, **kwargs)
        meter.adopt(_cache_tensors(cache), "kv_cache")
        return result

    cache.update = watched
    hooks.callback(vars(cache).pop, "update")  # which the cache otherwise holds as it holds the cache: it would outlive the run
    for part in ("self_attention_cache", "cross_attention_cache"):
        if part in vars(cache):
            _watch_cache(getattr(cache, part), meter, hooks)


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
    """Name the phases: before, each landmark, the other blocks, after; in the backward pass likewise, in reverse."""
    for number, (_, stack) in enumerate(block_lists(model)):
        names = names_of([signature(block) for block in stack])
        for index, block in enumerate(stack):
            name = f"stack {number} {names[index]}"

            def before(_module: Any, _args: Any, name: str = name) -> None:
                if not meter.phase.startswith(("backward", "optimizer")):
                    meter.enter(f"{_stem(meter.phase)}: {name}")

            def after(_module: Any, _args: Any, output: Any, name: str = name, ends: bool = index == len(stack) - 1) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                if hidden.requires_grad and not meter.phase.startswith("backward"):
                    hidden.register_hook(lambda _grad: meter.enter(f"backward: {name}"))
                if ends and not meter.phase.startswith("backward"):
                    meter.enter(f"{_stem(meter.phase)}: after stack")

            hooks.callback(block.register_forward_pre_hook(before).remove)
            hooks.callback(block.register_forward_hook(after).remove)


def _stem(phase: str) -> str:
    return phase.split(":")[0]


def _extend(result: Footprint, base: Footprint, deeper: Footprint, more: int) -> Footprint:
    """Add `more` times what `deeper` has and `base` has not: one block, or one of each of several groups of so many.

    Bytes: only phases that `base` has too; those of the blocks between the landmarks never hold the peak alone.
    """
    return Footprint(
        phases={
            name: combine([(1, parts), (more, deeper.phases[name]), (-more, base.phases[name])]) for name, parts in result.phases.items()
        },
        work={
            name: combine([(1, result.work.get(name, {})), (more, deeper.work.get(name, {})), (-more, base.work.get(name, {}))])
            for name in dict.fromkeys((*result.work, *deeper.work))
        },
    )
