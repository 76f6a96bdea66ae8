"""The command line: one verb is one short function that parses, calls the library and prints.

stdout is data, stderr is talk; `--json` prints one JSON object. Nothing heavy is imported before a verb needs it.
"""

import json
import os
import sys
from contextlib import redirect_stdout
from io import StringIO
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tightfit.cli.options import Gpus, Json, Model, QualityOption, Random, Size, Techniques, app, given, one_of, quiet, shown
from tightfit.talk import bar, complain, emit, out, refuse_unwritable, talk, write
from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError, near
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload

Adapter = Annotated[str, typer.Option(help="The folder that `tightfit tune` or PEFT wrote.", show_default=False)]


@app.command("plan")
def plan_command(
    model: Model,
    gpu: Gpus = None,
    ram: Size = None,
    disk: Size = None,
    task: Annotated[str, typer.Option(help="generate, tune or embed.")] = "generate",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens of prompt (generate), or of each sequence (tune, embed).")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 128,
    technique: Techniques = None,
    quality: QualityOption = "exact",
    random_weights: Random = False,
    as_json: Json = False,
    save: Annotated[str | None, typer.Option(help="Write the plan to this file, for `run --plan`.", show_default=False)] = None,
) -> None:
    """Say beforehand what a model will take and how fast it will be, without loading a weight."""
    workload = Workload(one_of("task", task, "generate", "tune", "embed"), batch, context, max_new_tokens)
    refuse_unwritable(save)
    quiet()
    from tightfit import verbs

    with talk.status(f"rehearsing {escape(model)}"):
        planned = verbs.plan(model, workload, Budget.parse(gpu, ram, disk), quality, technique or (), random_weights, alternatives=True)
    emit(planned.to_json(), as_json) or shown().show_plan(planned, out)
    if save:
        write(save, planned.to_json())


@app.command("run")
def run_command(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A folder, a preset, or a Hugging Face id.", show_default=False)] = None,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "Once upon a time",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 128,
    gpu: Gpus = None,
    ram: Size = None,
    disk: Size = None,
    adapter: Adapter = "",
    technique: Techniques = None,
    quality: QualityOption = "exact",
    plan: Annotated[str | None, typer.Option(help="Repeat the plan in this file.", show_default=False)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0)] = 50,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="For sampling: the same seed writes the same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be given again.", show_default=False)] = None,
    random_weights: Random = False,
    as_json: Json = False,
    save_report: Annotated[str | None, typer.Option(help="Write the report to this file.", show_default=False)] = None,
) -> None:
    """Run a model inside the budget, and show afterwards that the plan was kept."""
    if (model is None) == (plan is None):
        raise TightfitError("name a model, or a plan with `--plan`, and not both", hint="`tightfit run tightfit-demo --prompt Hello`")
    refuse_unwritable(save_report)
    quiet()
    if plan:
        _refuse_replanning(context)
        planned = Plan.load(plan)
    else:
        from tightfit import verbs

        with talk.status(f"rehearsing {escape(model or '')}"):
            planned = verbs.plan_prompt(
                model or "", prompt, max_new_tokens, Budget.parse(gpu, ram, disk), quality, technique or (), random_weights, chat, adapter
            )
    report = _run(planned, prompt, chat, as_json, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=tuple(stop or ()))
    emit(report.to_json(), as_json) or shown().show_report(report, talk)
    if save_report:
        write(save_report, report.to_json())


@app.command("eval")
def eval_command(
    model: Model,
    data: Annotated[str, typer.Argument(help="A text file.", show_default=False)],
    metric: Annotated[str, typer.Option(help="perplexity")] = "perplexity",
    gpu: Gpus = None,
    ram: Size = None,
    disk: Size = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a window; 512, or what the model has positions for.", show_default=False)
    ] = None,
    adapter: Adapter = "",
    technique: Techniques = None,
    quality: QualityOption = "exact",
    as_json: Json = False,
) -> None:
    """Measure how well a model predicts a text, inside the budget."""
    one_of("metric", metric, "perplexity")
    quiet()
    from tightfit import verbs

    with talk.status(f"rehearsing {escape(model)}"):
        planned = verbs.plan_text(model, context, Budget.parse(gpu, ram, disk), quality, technique or (), adapter)  # type: ignore[arg-type]
    with bar("evaluating", not as_json, "tokens") as progress:
        score = verbs.evaluate(planned, data, progress)
    values = {
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "report": score.report.to_json(),
    }
    if not emit(values, as_json):
        out.print(f"perplexity {score.perplexity:.3f}   bits per byte {score.bits_per_byte:.4f}   over {score.tokens} tokens")
        shown().show_report(score.report, talk)


@app.command("probe")
def probe_command(as_json: Json = False) -> None:
    """Measure this machine once, so that plans know its rates and overhead."""
    from dataclasses import asdict

    from tightfit.runtime.probe import probe
    from tightfit.terms.machine import machine_file

    with talk.status("probing") as status:
        machine = probe(lambda line: status.update(f"probing: {line}"))
    if not emit({**asdict(machine), "file": str(machine_file())}, as_json):
        for name, value in asdict(machine).items():
            out.print(f"{name:<22} {value:.4g}" if isinstance(value, float) else f"{name:<22} {value}")
        talk.print(f"kept in {machine_file()}", markup=False)


@app.command("report")
def report_command(file: Annotated[str, typer.Argument(help="A report that `run --save-report` wrote.")], as_json: Json = False) -> None:
    """Show a saved report again."""
    from tightfit.terms.report import Report

    try:
        with open(file) as stream:
            report = Report.from_json(json.load(stream))
    except OSError as error:
        raise TightfitError(f"cannot read `{file}`: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TightfitError(
            f"`{file}` is not a report of tightfit", hint="write one with `tightfit run … --save-report report.json`"
        ) from error
    emit(report.to_json(), as_json) or shown().show_report(report, out)


@app.command("list")
def list_command(as_json: Json = False) -> None:
    """List techniques, recipes and presets."""
    from tightfit.catalog import recipe_names, summary, technique_names
    from tightfit.presets import presets

    rooms = {"techniques": technique_names(), "recipes": recipe_names()}
    values = {room: {name: summary(name) for name in names} for room, names in rooms.items()} | {"presets": list(presets())}
    if not emit(values, as_json):
        for room in rooms:
            for name, text in values[room].items():
                label = name if room == "techniques" else f"recipe {name}"
                out.print(f"[bold]{label:<14}[/] {escape(text)}")
            out.print()
        out.print(f"[bold]presets[/]        {', '.join(values['presets'])}")


@app.command("explain")
def explain_command(name: Annotated[str, typer.Argument(help="A technique or a recipe.")], as_json: Json = False) -> None:
    """Explain a technique or a recipe: what it does and costs, what to expect, its settings and its paper."""
    from tightfit.catalog import explain

    explained = explain(name)
    if not emit(explained, as_json):
        out.print(explained["text"], markup=False)
        for setting in explained["settings"]:
            out.print(f"  {setting['name']} = {setting['default']}   {setting['price']}", markup=False)


@app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench_command(
    context: typer.Context, question: Annotated[str, typer.Argument(help="A folder of `bench/`.")], as_json: Json = False
) -> None:
    """Run a benchmark of the checkout that you are in, with its own options; what it found goes to its `results` as JSON."""
    import runpy
    from pathlib import Path

    folder = Path("bench")
    questions = sorted(path.parent.name for path in folder.glob("*/run.py"))
    if question not in questions:
        raise TightfitError(
            f"no benchmark is called `{question}`",
            hint=near(question, questions) or "benchmarks live in the checkout: run this in its root",
        )
    sys.argv = [str(folder / question / "run.py"), *context.args]
    with redirect_stdout(sys.stdout if as_json else StringIO()):  # a benchmark prints one JSON object, and talks on stderr
        runpy.run_path(sys.argv[0], run_name="__main__")
    if not as_json:
        out.print(f"results are in {folder / question / 'results'}")


@app.command("demo")
def demo_command(as_json: Json = False) -> None:
    """See the main job in a minute: plan, stream a model that is bigger than its budget, and report."""
    from tightfit.demo import demo

    emit(demo(Console(file=StringIO()) if as_json else out), as_json)


from tightfit.cli import placing, quantizing, recipe, tuning  # noqa: E402, F401  # their verbs join the app


def main() -> None:
    """The entry point: runs a verb; what the user can mend is one clear line and a hint, with exit code 1."""
    try:
        if app(standalone_mode=False) == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except TightfitError as error:
        complain(error)
        sys.exit(1)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        talk.print("\ninterrupted; nothing was left behind")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            if message := error.format_message():  # type: ignore[attr-defined]  # empty where the help was shown instead
                talk.print(f"[red]error:[/] {escape(message)}")
                talk.print("\n[cyan]hint:[/] `tightfit --help` lists the verbs, `tightfit VERB --help` its options")
            sys.exit(2)
        if os.environ.get("TIGHTFIT_TRACEBACK"):
            raise
        first = (str(error).strip().splitlines() or ["no message"])[0]
        talk.print(f"[red]error:[/] unexpected {type(error).__name__}: {escape(first)}")
        talk.print("\n[cyan]hint:[/] this is a bug in tightfit; please report it with what `TIGHTFIT_TRACEBACK=1` shows")
        sys.exit(70)


def _refuse_replanning(context: typer.Context) -> None:
    """A saved plan is repeated as it is: what would change it is refused, not ignored."""
    named = given(context, "gpu", "ram", "disk", "technique", "quality", "max_new_tokens", "random_weights", "adapter")
    if named:
        raise TightfitError(f"{named} would change the plan that `--plan` repeats", hint="leave it out, or plan again with it")


def _run(planned: Plan, prompt: str, chat: bool, as_json: bool, **sampling: Any) -> Any:
    quiet()
    from tightfit import verbs
    from tightfit.runtime.generate import Sampling

    if not as_json:
        shown().show_plan(planned, talk)
    told: list[str] = []

    def listen(piece: str) -> None:
        text = piece if told else prompt + piece
        told.append(piece)
        sys.stdout.write(text)
        sys.stdout.flush()

    with bar("loading", not as_json) as progress:
        report = verbs.run(planned, prompt, Sampling(**sampling), None if as_json else listen, progress, chat)
    if not as_json:
        out.print("" if told else f"(no tokenizer beside the weights: words stood for arbitrary ids, and {report.tokens} ids were written)")
    return report
