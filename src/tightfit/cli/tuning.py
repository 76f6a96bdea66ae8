"""The command line's verbs of tuning: `tune`, `export`."""

import os
import sys
from contextlib import nullcontext
from typing import Annotated, Any

import typer
from rich.markup import escape

from tightfit.cli.options import LATER, Json, Model, QualityOption, Size, Techniques, app, one_of, quiet, shown
from tightfit.talk import bar, emit, out, refuse_unwritable, talk, write
from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError
from tightfit.terms.plan import Plan
from tightfit.terms.report import Report
from tightfit.terms.tuning import Tuning
from tightfit.terms.units import show_bytes


@app.command("tune")
def tune_command(
    model: Model,
    data: Annotated[str, typer.Argument(help="JSONL (messages, instruction, text), a datasets folder, or a text.", show_default=False)],
    output: Annotated[str, typer.Option("--output", "-o", help="The folder that takes the adapter.", show_default=False)],
    technique: Techniques = None,
    full: Annotated[bool, typer.Option("--full", help="Tune the model itself, without an adapter.")] = False,
    gpu: Size = None,
    ram: Size = None,
    disk: Size = None,
    quality: QualityOption = "exact",
    batch: Annotated[int, typer.Option(min=1, help="Samples for one update.")] = 8,
    micro_batch: Annotated[int, typer.Option(min=0, help="Samples at a time; 0: the planner's choice.")] = 0,
    context: Annotated[int, typer.Option(min=0, help="Tokens at which samples are cut; 0: 1024, or what the model takes.")] = 0,
    epochs: Annotated[float, typer.Option(min=0.0, help="Times through the data.")] = 1.0,
    steps: Annotated[int, typer.Option(min=0, help="Updates, in place of epochs.")] = 0,
    lr: Annotated[float, typer.Option("--lr", "--learning-rate", min=0.0, help="Learning rate.")] = 2e-4,
    schedule: Annotated[str, typer.Option(help="constant, constant_with_warmup, linear or cosine.")] = "cosine",
    warmup: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the steps.")] = 0.03,
    weight_decay: Annotated[float, typer.Option(min=0.0)] = 0.0,
    clip: Annotated[float, typer.Option(min=0.0, help="Largest gradient norm; 0: any.")] = 1.0,
    learn: Annotated[str, typer.Option(help="completion: from the answers only; all: from every token.")] = "completion",
    packing: Annotated[bool, typer.Option("--packing", help="Fill every row with several samples.")] = False,
    mixed_precision: Annotated[str, typer.Option(help="no or bf16.")] = "no",
    held_out: Annotated[str | None, typer.Option("--eval", help="Data to measure the loss on.", show_default=False)] = None,
    eval_every: Annotated[int, typer.Option(min=0, help="Steps between evaluations; 0: before and after.")] = 0,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0: each epoch.")] = 0,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints that stay.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    bad_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of unreadable lines to put up with.")] = 0.0,
    track: Annotated[list[str] | None, typer.Option(help="tensorboard, or another of accelerate's trackers.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 32) - 1)] = 0,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Say what would happen, and stop.")] = False,
    as_json: Json = False,
    save_report: Annotated[str | None, typer.Option(help="Write the report to this file.", show_default=False)] = None,
) -> None:
    """Tune a model inside the budget: plan, learn, and leave an adapter that PEFT loads."""
    tuning = Tuning(
        epochs=epochs,
        steps=steps,
        learning_rate=lr,
        schedule=schedule,  # type: ignore[arg-type]  # checked there
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        learn=learn,  # type: ignore[arg-type]
        packing=packing,
        seed=seed,
        evaluate_every=eval_every,
        save_every=save_every,
        keep=keep,
        bad_share=bad_share,
    )
    precision = one_of("mixed precision", mixed_precision, "no", "bf16")
    refuse_unwritable(save_report)
    quiet()
    from tightfit.verbs import tuning as verbs

    if full and verbs.trains(technique or ()):
        raise TightfitError("`--full` tunes the model itself; an adapter would freeze it", hint="leave out `--full` or the adapter")
    is_main = os.environ.get("RANK", "0") == "0"  # of the processes that `accelerate launch` starts
    shows = is_main and not as_json
    with bar("reading", shows, "samples") as progress:
        lesson = verbs.read_lesson(model, data, context, tuning, held_out, progress)
    with talk.status(f"rehearsing {escape(model)}") if is_main else nullcontext():
        given = [*(technique or ()), *([] if full or verbs.trains(technique or ()) else ["lora"])]
        before = verbs.plan_of(output) if resume else None
        budget = before.budget if before and not (gpu or ram or disk) else Budget.parse(gpu, ram, disk)
        rows = micro_batch or (before.workload.micro_batch if before else 0)
        planned = verbs.plan_tuning(model, lesson, batch, budget, quality, given, rows, precision)  # type: ignore[arg-type]
    if plan_only:
        if is_main:
            emit(planned.to_json(), as_json) or shown().show_plan(planned, out)
        return
    report = _tuned(planned, lesson, output, tuning, resume, tuple(track or ()), shows)
    if is_main:
        emit(report.to_json(), as_json) or _tell(report, model, output, full)
        if save_report:
            write(save_report, report.to_json())


def _tuned(planned: Plan, lesson: Any, output: str, tuning: Tuning, resume: bool, trackers: tuple[str, ...], shows: bool) -> Report:
    from tightfit.verbs import tuning as verbs

    if shows:
        shown().show_plan(planned, talk)
    try:
        with bar("loading", shows) as loading, bar("tuning", shows, "steps") as learning:

            def watch(done: int, whole: int, loss: float) -> None:
                learning(done, whole, f"loss {loss:.4f}")
                if shows and done % max(1, whole // 10) == 0:
                    talk.print(f"step {done} of {whole}   loss {loss:.4f}")

            return verbs.tune(planned, lesson, output, tuning, resume, trackers, loading, watch)
    except KeyboardInterrupt:
        talk.print(f"\ninterrupted; `--resume` goes on from the last checkpoint in {escape(output)}")
        sys.exit(LATER)


def _tell(report: Report, model: str, output: str, full: bool) -> None:
    scores = report.scores
    held_out = [f"{scores[name]:.4f}" for name in ("held_out_loss_before", "held_out_loss") if name in scores]
    out.print(
        f"loss {scores['loss']:.4f} after {scores['steps']:.0f} steps" + (f"   held out {' → '.join(held_out)}" if held_out else ""),
        markup=False,
    )
    shown().show_report(report, talk)
    use = f"tightfit run {output}" if full else f"tightfit run {model} --adapter {output}"
    talk.print(f"saved in {escape(output)}; use it with `{escape(use)} --prompt …`", markup=True)


@app.command("export")
def export_command(
    folder: Annotated[str, typer.Argument(help="The folder that `tightfit tune` or `tightfit quantize` wrote.", show_default=False)],
    output: Annotated[str, typer.Option("--output", "-o", help="A new folder.", show_default=False)],
    to: Annotated[
        str, typer.Option(help="peft for an adapter; compressed-tensors (what a model becomes by default) or gptq.", show_default=False)
    ] = "",
    rank: Annotated[int | None, typer.Option(min=1, help="The rank to cut a `dylora` adapter to.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Write an adapter as a plain PEFT LoRA, or a quantized model in another program's format."""
    quiet()
    from tightfit.verbs.exporting import export

    with bar("writing", not as_json) as progress:
        values = export(folder, output, to, rank, progress)
    if emit(values, as_json):
        return
    if "adapter" in values:
        out.print(f"saved in {output}; `peft.PeftModel.from_pretrained(model, {output!r})` loads it", markup=False)
    else:
        out.print(f"saved in {output}: {show_bytes(values['bytes'])} for programs that read {values['format']}", markup=False)
        if values["format"] == "compressed-tensors":
            talk.print("in transformers: from_pretrained(…, quantization_config=CompressedTensorsConfig(dequantize=True))", markup=False)
