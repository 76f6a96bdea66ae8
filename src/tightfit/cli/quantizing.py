"""The command line's verb of quantizing: `quantize`."""

import sys
from typing import Annotated

import typer
from rich.markup import escape

from tightfit.cli.options import LATER, Json, Model, Size, app, quiet, shown
from tightfit.talk import bar, emit, out, refuse_unwritable, talk, write
from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError
from tightfit.terms.quantizing import QuantizeReport


@app.command("quantize")
def quantize_command(
    model: Model,
    text: Annotated[str | None, typer.Argument(help="A text file like what the model will read.", show_default=False)] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="The folder that takes the model.", show_default=False)] = "",
    technique: Annotated[str, typer.Option("--technique", "-t", help="lean, gptq or rtn, as NAME:key=value,…")] = "lean",
    bits: Annotated[int, typer.Option(help="Bits a weight, as in `--technique NAME:bits=3`; 0: the technique's own.")] = 0,
    gpu: Size = None,
    ram: Size = None,
    disk: Size = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of the text at most.")] = 128,
    context: Annotated[int, typer.Option(min=0, help="Tokens of a sample; 0: 512, or what the model takes.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Say what would happen, and stop.")] = False,
    as_json: Json = False,
    save_report: Annotated[str | None, typer.Option(help="Write the report to this file.", show_default=False)] = None,
) -> None:
    """Write a model in few bits, one block after the other, inside the budget."""
    if not output and not plan_only:
        raise TightfitError("`quantize` needs a folder to write to", hint="add `-o FOLDER`")
    refuse_unwritable(save_report)
    quiet()
    from tightfit import catalog
    from tightfit.describe.source import describe
    from tightfit.verbs import quantizing as verbs

    name, settings = catalog.parse(technique)
    settings |= {"bits": bits} if bits else {}
    with talk.status(f"rehearsing {escape(model)}"):
        skeleton = describe(model, "embed", fetch=False)
        calibration = verbs.read_calibration(skeleton, text, context, samples) if text else None
        planned = verbs.plan_quantize(skeleton, calibration, name, settings, Budget.parse(gpu, ram, disk))
    if plan_only:
        emit(planned.to_json(), as_json) or shown().show_plan(planned, out)
        return
    if not as_json:
        shown().show_plan(planned, talk)
    try:
        with bar("quantizing", not as_json, "layers") as progress:
            report = verbs.quantize(planned, calibration, output, resume, progress)
    except KeyboardInterrupt:
        talk.print(f"\ninterrupted; `--resume` goes on after the last block that is done, for {escape(output)}")
        sys.exit(LATER)
    emit(report.to_json(), as_json) or _tell(report)
    if save_report:
        write(save_report, report.to_json())


def _tell(report: QuantizeReport) -> None:
    shown().show_report(report, out)
    talk.print(f"run it: {escape(shown().use_of(report, report.output))}", highlight=False)
