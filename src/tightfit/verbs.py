"""Verbs: each job as one call, for Python users and for the command line. They only pass values from room to room."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from tightfit import catalog
from tightfit.contracts import QUALITIES, Quality
from tightfit.describe.skeleton import Skeleton
from tightfit.describe.source import describe
from tightfit.planner.choose import choose
from tightfit.planner.outcome import Request
from tightfit.rehearse.fake import check_length
from tightfit.runtime.build import Progress, build
from tightfit.runtime.evaluate import Score, perplexity, read_text
from tightfit.runtime.generate import Listener, Sampling, generate
from tightfit.runtime.process import keep_heap_tight
from tightfit.runtime.tokens import encode
from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError, near
from tightfit.terms.machine import Machine
from tightfit.terms.plan import Plan
from tightfit.terms.report import Report
from tightfit.terms.workload import Workload

Asked = Mapping[str, Mapping[str, Any]] | Iterable[str]
"""Techniques by name with settings, or as texts such as `nf4:double_quantization=false`."""


def plan(
    model: str | nn.Module | Skeleton,
    workload: Workload | None = None,
    budget: Budget | None = None,
    quality: Quality = "exact",
    techniques: Asked = (),
    random_weights: bool = False,
    machine: Machine | None = None,
    alternatives: bool = True,
) -> Plan:
    """Say beforehand what will happen: the fastest way to do `workload` inside `budget`, its bytes by tier and kind, and its pace.

    No weight is read. With `alternatives` the plan also says what other qualities would give. Raises
    `DoesNotFit` when nothing stays inside the budget, and `TightfitError` for faults of the input.
    """
    workload, budget = workload or Workload(), budget or Budget.here()
    if quality not in QUALITIES:
        raise TightfitError(f"no quality is called `{quality}`", hint=near(quality, QUALITIES))
    skeleton = model if isinstance(model, Skeleton) else describe(model, workload.task, random_weights=random_weights)
    check_length(skeleton.config.get_text_config(), workload.context)
    available = {name: kind for name, kind in catalog.techniques().items() if name != "offload"}
    request = Request(skeleton, workload, budget, quality, _settings(techniques), random_weights, alternatives)
    return choose(request, machine or Machine.here(), available | {"offload": catalog.technique("offload")})


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
    with build(planned, skeleton, progress) as built:
        return generate(built, encoded, sampling, listen)


def evaluate(planned: Plan, file: str, progress: Callable[[int, int], None] = lambda done, whole: None) -> Score:
    """Perplexity of the text in `file` under the planned model, in windows of the planned length."""
    keep_heap_tight()
    skeleton = describe(planned.model, "generate", random_weights=planned.random_weights)
    text = read_text(file)
    ids = encode(skeleton, text, new_tokens=-(1 << 62)).input_ids
    with build(planned, skeleton) as built:
        return perplexity(built, ids, len(text.encode()), planned.workload.tokens, progress)


def apply(model: nn.Module, techniques: Asked) -> nn.Module:
    """Change a live model by `techniques`, in their order of stages, keeping its weights; returns the same model.

    For other people's loops: the result is an ordinary module that Hugging Face `Trainer` and `generate` take.
    """
    chosen = [catalog.make(name, settings) for name, settings in _settings(techniques).items()]
    held = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for technique in sorted(chosen, key=lambda technique: technique.stage):
        technique.apply(model)
    _absorb(model, held)
    return model


def _absorb(model: nn.Module, held: dict[str, Any]) -> None:
    """Let modules that replaced others take the weights of those."""
    from tightfit.contracts import Absorbs

    for path, module in model.named_modules():
        if isinstance(module, Absorbs):
            for name in [name for name in held if name.rpartition(".")[0] == path]:
                module.absorb(name.rpartition(".")[2], held.pop(name))


def _settings(techniques: Asked) -> dict[str, Mapping[str, Any]]:
    if isinstance(techniques, Mapping):
        return dict(techniques)
    return dict(catalog.parse(text) for text in techniques)
