"""Verbs: each job as one call, for Python users and for the command line. They only pass values from room to room."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tightfit import catalog
from tightfit.contracts import QUALITIES, Quality
from tightfit.describe.lengths import check_lengths, positions_of
from tightfit.describe.skeleton import Skeleton
from tightfit.describe.source import describe
from tightfit.planner.choose import choose
from tightfit.planner.outcome import Request
from tightfit.runtime import adapters
from tightfit.runtime.adapters import check_adapter, load_adapter, read_adapter
from tightfit.runtime.build import Built, Progress, build
from tightfit.runtime.evaluate import Score, check_scorable, perplexity, read_text
from tightfit.runtime.generate import Listener, Sampling, generate
from tightfit.runtime.process import keep_heap_tight
from tightfit.runtime.tokens import encode
from tightfit.runtime.weights import refuse_weightless
from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError, near
from tightfit.terms.machine import Machine
from tightfit.terms.plan import Plan
from tightfit.terms.report import Report
from tightfit.terms.workload import Workload

Asked = Mapping[str, Mapping[str, Any]] | Iterable[str]
"""Techniques by name with settings, or as texts such as `nf4:double_quantization=false`."""


WINDOW = 512
"""Tokens of a text that are scored at once, where nobody says how many."""


def plan(
    model: str | nn.Module | Skeleton,
    workload: Workload | None = None,
    budget: Budget | None = None,
    quality: Quality = "exact",
    techniques: Asked = (),
    random_weights: bool = False,
    machine: Machine | None = None,
    alternatives: bool = False,
    adapter: str = "",
) -> Plan:
    """Say beforehand what will happen: the fastest way to do `workload` inside `budget`, its bytes by tier and kind, and its pace.

    No weight is read. With `alternatives` the plan also says what other qualities would give; trying them loads their libraries into
    this process, so leave it out where the plan is run at once. `adapter` is a folder that `tune` or PEFT wrote. Raises `DoesNotFit`
    when nothing stays inside the budget, and `TightfitError` for faults of the input.
    """
    workload, budget = workload or Workload(), budget or Budget.here()
    if quality not in QUALITIES:
        raise TightfitError(f"no quality is called `{quality}`", hint=near(quality, QUALITIES))
    skeleton = model if isinstance(model, Skeleton) else describe(model, workload.task, random_weights, fetch=False)
    check_lengths(skeleton.config, workload.tokens, workload.new_tokens if workload.task == "generate" else 0)
    asked = settings_of(techniques) | (_settings_of_adapter(adapter, skeleton) if adapter else {})
    request = Request(skeleton, workload, budget, quality, asked, random_weights, alternatives)
    return replace(choose(request, machine or Machine.here(), catalog.techniques()), adapter=adapter)


def plan_prompt(
    model: str,
    prompt: str,
    new_tokens: int = 128,
    budget: Budget | None = None,
    quality: Quality = "exact",
    techniques: Asked = (),
    random_weights: bool = False,
    chat: bool = False,
    adapter: str = "",
) -> Plan:
    """The plan for writing `new_tokens` after exactly this prompt, for `run`. Raises as `plan` does, and for a shape without weights."""
    skeleton = describe(model, random_weights=random_weights, fetch=False)
    if not random_weights:
        refuse_weightless(skeleton)
    tokens = encode(skeleton, prompt, chat, new_tokens).length
    workload = Workload("generate", 1, tokens, new_tokens)
    return plan(skeleton, workload, budget, quality, techniques, random_weights, adapter=adapter)


def plan_text(
    model: str,
    window: int | None = None,
    budget: Budget | None = None,
    quality: Quality = "exact",
    techniques: Asked = (),
    adapter: str = "",
) -> Plan:
    """The plan for scoring a text in windows of `window` tokens, for `evaluate`; by default 512, or what the model has positions for."""
    skeleton = describe(model, fetch=False)
    tokens = window or min(WINDOW, positions_of(skeleton.config) or WINDOW)
    return plan(skeleton, Workload("embed", 1, tokens), budget, quality, techniques, adapter=adapter)


def run(
    planned: Plan,
    prompt: str,
    sampling: Sampling | None = None,
    listen: Listener | None = None,
    progress: Progress = lambda done, whole: None,
    chat: bool = False,
) -> Report:
    """Carry `planned` out: load inside the budget, write after `prompt`, and report what it took against the plan."""
    if planned.workload.task != "generate" or planned.workload.batch != 1:
        raise TightfitError(
            f"the plan is for `{planned.workload.task}` with a batch of {planned.workload.batch}; running writes one text",
            hint="plan again with `--task generate --batch 1`",
        )
    keep_heap_tight()
    skeleton = describe(planned.model, planned.workload.task, random_weights=planned.random_weights)
    encoded = encode(skeleton, prompt, chat, planned.workload.new_tokens)
    if encoded.length > planned.workload.tokens:
        raise TightfitError(
            f"the prompt has {encoded.length} tokens; the plan allows {planned.workload.tokens}",
            hint="plan again with a larger `--context`",
        )
    with _built(planned, skeleton, progress) as built:
        return generate(built, encoded, sampling, listen)


def evaluate(planned: Plan, file: str, progress: Callable[[int, int], None] = lambda done, whole: None) -> Score:
    """Perplexity of the text in `file` under the planned model, in windows of the planned length."""
    keep_heap_tight()
    skeleton = describe(planned.model, "generate", random_weights=planned.random_weights)
    ids, text_bytes = _scorable(planned, skeleton, file)
    with _built(planned, skeleton) as built:
        return perplexity(built, ids, text_bytes, planned.workload.tokens, progress)


def check_text(planned: Plan, file: str) -> None:
    """Refuse, before other work, what `evaluate` would refuse about the text in `file`. No weight is read."""
    _scorable(planned, describe(planned.model, "generate", random_weights=planned.random_weights, fetch=False), file)


def _scorable(planned: Plan, skeleton: Skeleton, file: str) -> tuple[Tensor, int]:
    """The text in `file` as the model reads it, and its bytes.  # → (1, tokens)"""
    text = read_text(file)
    encoded = encode(skeleton, text, new_tokens=-(1 << 62))
    check_scorable(skeleton.config, encoded.length, planned.workload.tokens)
    if encoded.tokenizer is None:
        raise TightfitError(
            f"`{planned.model}` has no tokenizer, so a text cannot be scored", hint="put `tokenizer.json` beside the weights"
        )
    return encoded.input_ids, len(text.encode())


def apply(model: nn.Module, techniques: Asked) -> nn.Module:
    """Change a live model by `techniques`, in their order of stages, keeping its weights; returns the same model.

    For other people's loops: the result is an ordinary module that Hugging Face `Trainer` and `generate` take.
    """
    chosen = [catalog.make(name, settings) for name, settings in settings_of(techniques).items()]
    for technique in sorted(chosen, key=lambda technique: technique.stage):
        technique.apply(model)
    return model


def save_adapter(model: nn.Module, techniques: Asked, folder: str) -> None:
    """Write what `techniques` have learned in a live model, after your own loop, so that `load_adapter` and `--adapter` read it.

    An adapter that PEFT knows is written as PEFT's. Which weights the base had is not noted: a live model may have changed them.
    """
    facts = {"base": model.config.name_or_path, "digest": ""}
    adapters.save_adapter(model, settings_of(techniques), Path(folder), facts)


@contextmanager
def _built(planned: Plan, skeleton: Skeleton, progress: Progress = lambda done, whole: None) -> Iterator[Built]:
    """The planned model, with what its adapter has learned."""
    adapter = read_adapter(planned.adapter) if planned.adapter else None
    with build(planned, skeleton, progress) as built:
        if adapter:
            check_adapter(adapter, skeleton)
            load_adapter(built, adapter)
        yield built


def _settings_of_adapter(folder: str, skeleton: Skeleton) -> dict[str, Mapping[str, Any]]:
    """The technique by which the adapter in `folder` was made, to be applied again."""
    adapter = read_adapter(folder)
    if not adapter.technique:
        raise TightfitError(f"`{folder}` holds a whole model, not an adapter", hint=f"name it in place of `{skeleton.name}`")
    check_adapter(adapter, skeleton)
    return {adapter.technique: adapter.settings}


def settings_of(techniques: Asked) -> dict[str, Mapping[str, Any]]:
    """Settings by name of technique, whichever way they were asked for."""
    if isinstance(techniques, Mapping):
        return {name: dict(settings) for name, settings in techniques.items()}
    return dict(catalog.parse(text) for text in techniques)
