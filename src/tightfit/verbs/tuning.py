"""Verbs of tuning: read what is to be learned, plan for it, tune, export. They only pass values from room to room."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tightfit import catalog
from tightfit.contracts import Quality, Stage
from tightfit.data.records import read_records
from tightfit.data.text import Samples, encode_records
from tightfit.describe.lengths import check_lengths, positions_of
from tightfit.describe.skeleton import Skeleton
from tightfit.describe.source import describe
from tightfit.runtime.adapters import facts_of, refuse_unsavable
from tightfit.runtime.build import Progress, build
from tightfit.runtime.process import keep_heap_loose, keep_heap_tight
from tightfit.runtime.tokens import load_tokenizer
from tightfit.runtime.weights import refuse_weightless
from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError
from tightfit.terms.machine import Machine
from tightfit.terms.plan import Plan
from tightfit.terms.report import Report
from tightfit.terms.tuning import Tuning
from tightfit.terms.workload import Precision, Workload
from tightfit.verbs import Asked, plan, settings_of

_NO_MATTER = {"evaluate_every", "save_every", "keep", "bad_share"}
"""Settings on which no loss depends. What was left out of the data shows in its digest."""

LONGEST = 1024
"""Tokens at which a sample is cut where nobody says at how many; shorter where the model has fewer positions."""


def read_lesson(
    model: str,
    data: str,
    context: int = 0,
    tuning: Tuning | None = None,
    held_out: str | None = None,
    progress: Callable[[int, int], None] = lambda done, whole: None,
) -> Any:
    """What a run learns from: the samples of `data` in the model's tokens, cut at `context`, and those of `held_out`.

    Raises `TightfitError` for files that cannot be read, too many unreadable lines, and a model without a tokenizer.
    """
    from tightfit.runtime.tune import Lesson

    tuning, skeleton = tuning or Tuning(), describe(model, "tune", fetch=False)
    refuse_weightless(skeleton)
    _refuse_other_heads(skeleton)
    tokenizer, config = load_tokenizer(skeleton), skeleton.config
    most = context or min(LONGEST, positions_of(config) or LONGEST)
    check_lengths(config, most)

    def encoded(file: str) -> Samples:
        records = read_records(file, tuning.bad_share)
        vocabulary = config.get_text_config(decoder=True).vocab_size
        both = config.is_encoder_decoder
        return encode_records(records, tokenizer, most, tuning.learn, tuning.packing, both, vocabulary, progress)

    return Lesson(encoded(data), encoded(held_out) if held_out else None)


def _refuse_other_heads(skeleton: Skeleton) -> None:
    """Text teaches what predicts text."""
    model = skeleton.meta_model()
    if model.get_output_embeddings() is None or model.loss_type == "ForMaskedLM":
        raise TightfitError(
            f"`{skeleton.name}` is a `{type(model).__name__}`, which does not predict the next token",
            hint="give it its own loop: `tightfit.apply(model, [...])` and Hugging Face `Trainer`",
        )


def plan_tuning(
    model: str | Skeleton,
    lesson: Any,
    batch: int = 8,
    budget: Budget | None = None,
    quality: Quality = "exact",
    techniques: Asked = ("lora",),
    micro_batch: int = 0,
    precision: Precision = "no",
    alternatives: bool = False,
) -> Plan:
    """The plan for tuning on `lesson` (`read_lesson`) with `batch` samples an update; without techniques the whole model is tuned.

    The micro-batch is the planner's choice unless it is said. `chunked_loss` comes along wherever the model predicts tokens: it costs
    nothing. Raises as `plan`.
    """
    skeleton = model if isinstance(model, Skeleton) else describe(model, "tune", fetch=False)
    asked = settings_of(techniques)
    if skeleton.meta_model().get_output_embeddings() is not None:
        asked.setdefault("chunked_loss", {})
    if not trains(asked):
        _refuse_unsavable(skeleton, asked)
    batch, parts = min(batch, len(lesson.samples)), [part for part in (lesson.samples, lesson.held_out) if part]
    workload = Workload(
        "tune",
        batch,
        max(part.longest for part in parts),
        micro_batch=min(micro_batch, batch),
        precision=precision,
        target_tokens=max(part.longest_target for part in parts),
    )
    machine = Machine.here()
    held = replace(machine, overhead_ram=machine.overhead_ram + lesson.held_bytes)
    return plan(computed_in(skeleton, precision, asked), workload, budget, quality, asked, machine=held, alternatives=alternatives)


def _refuse_unsavable(skeleton: Skeleton, techniques: Mapping[str, Any]) -> None:
    """Said before the work: what tunes the model itself must be able to write it."""
    quantized = [name for name in techniques if catalog.technique(name).stage == Stage.QUANTIZE]
    if quantized or skeleton.stored:
        few = f"`{quantized[0]}`" if quantized else "few bits"
        raise TightfitError(
            f"a model in {few} cannot be tuned itself: rounded weights have no gradients",
            hint="leave out `--full`, so that an adapter is tuned beside it",
        )
    refuse_unsavable(skeleton.meta_model())


def computed_in(skeleton: Skeleton, precision: Precision, techniques: Mapping[str, Any]) -> Skeleton:
    """The model as it is loaded: a frozen base in the precision that it computes in, for autocast would keep a cast copy of each weight."""
    if precision == "no" or not trains(techniques):
        return skeleton
    return replace(skeleton, dtype=torch.bfloat16)


def trains(techniques: Asked) -> bool:
    """Whether one of `techniques` adds what is trained, and freezes the model."""
    return any(catalog.technique(name).stage == Stage.ADAPT for name in settings_of(techniques))


def tune(
    planned: Plan,
    lesson: Any,
    out: str,
    tuning: Tuning | None = None,
    resume: bool = False,
    trackers: Iterable[str] = (),
    progress: Progress = lambda done, whole: None,
    watch: Callable[[int, int, float], None] = lambda done, whole, loss: None,
) -> Report:
    """Carry `planned` out: load inside the budget, learn `lesson`, leave the adapter and its checkpoints in `out`, and report.

    With `resume` a run that was interrupted goes on from its last checkpoint. `trackers` are accelerate's (`tensorboard`, `wandb`, …).
    Raises `TightfitError` for a plan of another kind, a folder that is in use, another request than that which is resumed, and a loss
    that is not finite.
    """
    from tightfit.runtime import checkpoint
    from tightfit.runtime.tune import tune as run_loop

    if planned.workload.task != "tune":
        raise TightfitError(f"the plan is for `{planned.workload.task}`, not for tuning", hint="plan again with `--task tune`")
    tuning, folder = tuning or Tuning(), Path(out)
    keep_heap_loose() if has_room(planned) else keep_heap_tight()
    skeleton = describe(planned.model, "tune", random_weights=planned.random_weights)
    facts = facts_of(skeleton)
    skeleton = computed_in(skeleton, planned.workload.precision, planned.techniques)
    accelerator = _accelerator(planned, folder, trackers)
    request = request_of(planned, lesson, tuning, facts["digest"])
    if accelerator.is_main_process:
        if resume:
            checkpoint.check_resumable(folder, request)
        else:
            checkpoint.begin(folder, request, planned)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("tightfit", asdict(tuning))
    torch.manual_seed(tuning.seed)
    with build(planned, skeleton, progress) as built:
        checkpoints = checkpoint.Checkpoints(folder, accelerator, {**facts, "tuning": asdict(tuning)}, tuning.keep)
        return run_loop(built, lesson, tuning, checkpoints, accelerator, resume, watch)


def plan_of(out: str) -> Plan:
    """The plan of the run in `out`, whose budget and micro-batch a resumed one keeps. Raises `TightfitError` where there is none."""
    from tightfit.runtime.checkpoint import plan_of_run

    return plan_of_run(Path(out))


def request_of(planned: Plan, lesson: Any, tuning: Tuning, base: str) -> dict[str, Any]:
    """What a run was asked, so far as its losses depend on it: where blocks rest does not change them."""
    work = planned.workload
    moving = {name for name in planned.techniques if catalog.technique(name).stage == Stage.MOVE}
    return {
        "base": base,
        "data": lesson.samples.digest,
        "held-out data": lesson.held_out.digest if lesson.held_out else "",
        "batch": work.batch,
        "micro-batch": work.rows,
        "context": max(work.tokens, work.target_tokens),
        "precision": work.precision,
        "techniques": {name: dict(settings) for name, settings in planned.techniques.items() if name not in moving},
        **{f"setting `{name}`": value for name, value in asdict(tuning).items() if name not in _NO_MATTER},
    }


def has_room(planned: Plan) -> bool:
    """Whether the budget has half as much to spare as what comes and goes in a step, so that freed memory may be kept for the next."""
    parts = planned.predicted["ram"]
    passing = sum(parts.get(kind, 0) for kind in ("activations", "gradients", "workspace"))
    return 2 * (planned.budget.ram - planned.predicted_bytes("ram")) > passing


def _accelerator(planned: Plan, folder: Path, trackers: Iterable[str]) -> Any:
    """Devices, processes and trackers as `accelerate launch` set them. Mixed precision is the plan's, so that memory is as promised."""
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", planned.workload.precision):
        raise TightfitError(
            f"accelerate was launched with mixed precision `{launched}`, the plan computes with `{planned.workload.precision}`",
            hint="ask tightfit for it: `--mixed-precision bf16`",
        )
    asked, places = list(trackers), ProjectConfiguration(str(folder), logging_dir=str(folder / "tensorboard"))
    try:
        on_cpu = planned.compute_tier == "ram"
        accelerator = Accelerator(
            mixed_precision="no",
            cpu=on_cpu,
            log_with=asked or None,
            project_config=places,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the loop splits batches by itself
        )
    except (ValueError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise TightfitError(f"accelerate refuses: {reason}", hint="`--track tensorboard` is the usual tracker") from error
    if missing := {*asked} - {str(found) for found in accelerator.log_with}:
        raise TightfitError(f"the tracker `{missing.pop()}` is not installed", hint=f"`pip install {' '.join(asked)}`")
    if accelerator.num_processes > 1 and not accelerator.distributed_type.startswith("MULTI"):
        raise TightfitError(
            f"tuning cannot run under {accelerator.distributed_type} yet",
            hint="launch with plain data parallelism: `accelerate launch --multi_gpu`; the plan makes the model fit into each process",
        )
    return accelerator
