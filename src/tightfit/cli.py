"""The command line: one verb is one short function that parses, calls the library and prints.

stdout is data, stderr is talk; `--json` prints one JSON object. Nothing heavy is imported before a verb needs it.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError, near
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload

app = typer.Typer(
    name="tightfit",
    help=__import__("tightfit").__doc__.split("\n")[0],
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, talk = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)

DEMO = "tightfit-demo"
Model = Annotated[str, typer.Argument(help="A folder, a preset (see `tightfit list`), or a Hugging Face id.", show_default=False)]
Size = Annotated[str | None, typer.Option(help="A size such as 6GiB or 6GB.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Techniques = Annotated[
    list[str] | None, typer.Option("--technique", help="NAME or NAME:key=value,…; may be given again.", show_default=False)
]
QualityOption = Annotated[str, typer.Option(help="exact: stored precision; near: at least 4 bits; small: anything.")]
Random = Annotated[
    bool, typer.Option("--random-weights", help="Run the shape without its weights: for memory and speed, never for quality.")
]


@app.command("plan")
def plan_command(
    model: Model,
    gpu: Size = None,
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
    workload = Workload(_task(task), batch, context, max_new_tokens)
    _refuse_unwritable(save)
    planned = _plan(model, workload, Budget.parse(gpu, ram, disk), quality, technique, random_weights, alternatives=True)
    _print(planned.to_json(), as_json) or _show().show_plan(planned, out)
    if save:
        _write(save, planned.to_json())


@app.command("run")
def run_command(
    model: Annotated[str | None, typer.Argument(help="A folder, a preset, or a Hugging Face id.", show_default=False)] = None,
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = "Once upon a time",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 128,
    gpu: Size = None,
    ram: Size = None,
    disk: Size = None,
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
    _refuse_unwritable(save_report)
    planned = (
        Plan.load(plan)
        if plan
        else _plan_prompt(model or "", prompt, chat, max_new_tokens, Budget.parse(gpu, ram, disk), quality, technique, random_weights)
    )
    report = _run(planned, prompt, chat, as_json, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=tuple(stop or ()))
    _print(report.to_json(), as_json) or _show().show_report(report, talk)
    if save_report:
        _write(save_report, report.to_json())


@app.command("eval")
def eval_command(
    model: Model,
    data: Annotated[str, typer.Argument(help="A text file.", show_default=False)],
    metric: Annotated[str, typer.Option(help="perplexity")] = "perplexity",
    gpu: Size = None,
    ram: Size = None,
    disk: Size = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    technique: Techniques = None,
    quality: QualityOption = "exact",
    as_json: Json = False,
) -> None:
    """Measure how well a model predicts a text, inside the budget."""
    if metric != "perplexity":
        raise TightfitError(f"no metric is called `{metric}`", hint=near(metric, ["perplexity"]))
    planned = _plan(model, Workload("embed", 1, context), Budget.parse(gpu, ram, disk), quality, technique, False)
    from tightfit import verbs

    with _bar("evaluating", not as_json) as progress:
        score = verbs.evaluate(planned, data, progress)
    values = {
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "tokens": score.tokens,
        "report": score.report.to_json(),
    }
    if not _print(values, as_json):
        out.print(f"perplexity {score.perplexity:.3f}   bits per byte {score.bits_per_byte:.4f}   over {score.tokens} tokens")
        _show().show_report(score.report, talk)


@app.command("probe")
def probe_command(as_json: Json = False) -> None:
    """Measure this machine once, so that plans know its rates and overhead."""
    from dataclasses import asdict

    from tightfit.runtime.probe import probe
    from tightfit.terms.machine import machine_file

    with talk.status("probing") as status:
        machine = probe(lambda line: status.update(f"probing: {line}"))
    if not _print({**asdict(machine), "file": str(machine_file())}, as_json):
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
    _print(report.to_json(), as_json) or _show().show_report(report, out)


@app.command("list")
def list_command(as_json: Json = False) -> None:
    """List techniques and presets."""
    from tightfit.catalog import technique_names, technique_summary
    from tightfit.presets import presets

    values = {"techniques": {name: technique_summary(name) for name in technique_names()}, "presets": list(presets())}
    if not _print(values, as_json):
        for name, summary in values["techniques"].items():
            out.print(f"[bold]{name:<10}[/] {summary}")
        out.print(f"\n[bold]presets[/]    {', '.join(values['presets'])}")


@app.command("explain")
def explain_command(name: Annotated[str, typer.Argument(help="A technique.")], as_json: Json = False) -> None:
    """Explain a technique: what shrinks, what it costs, how it works, its settings and its paper."""
    from tightfit.catalog import explain

    explained = explain(name)
    if not _print(explained, as_json):
        out.print(explained["text"], markup=False)
        for setting in explained["settings"]:
            out.print(f"  {setting['name']} = {setting['default']}   {setting['price']}", markup=False)


@app.command("bench")
def bench_command(
    question: Annotated[str, typer.Argument(help="A folder of `bench/`.")], arguments: Annotated[list[str] | None, typer.Argument()] = None
) -> None:
    """Run a benchmark of the checkout that you are in."""
    import runpy
    from pathlib import Path

    folder = Path("bench")
    questions = sorted(path.parent.name for path in folder.glob("*/run.py"))
    if question not in questions:
        raise TightfitError(
            f"no benchmark is called `{question}`",
            hint=near(question, questions) or "benchmarks live in the checkout: run this in its root",
        )
    sys.argv = [str(folder / question / "run.py"), *(arguments or [])]
    runpy.run_path(sys.argv[0], run_name="__main__")


@app.command("demo")
def demo_command() -> None:
    """See the main job in a minute: plan, stream a model that is bigger than its budget, and report."""
    from tightfit.demo import demo

    demo(out, talk)


def main() -> None:
    """The entry point: runs a verb; what the user can mend is one clear line and a hint, with exit code 1."""
    try:
        if app(standalone_mode=False) == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
    except TightfitError as error:
        _complain(error)
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
            talk.print(f"[red]error:[/] {escape(error.format_message())}")  # type: ignore[attr-defined]
            sys.exit(2)
        if os.environ.get("TIGHTFIT_TRACEBACK"):
            raise
        first = (str(error).strip().splitlines() or ["no message"])[0]
        talk.print(f"[red]error:[/] unexpected {type(error).__name__}: {escape(first)}")
        talk.print("\n[cyan]hint:[/] this is a bug in tightfit; please report it with what `TIGHTFIT_TRACEBACK=1` shows")
        sys.exit(70)


def _complain(error: TightfitError) -> None:
    talk.print(f"[red]error:[/] {escape(str(error))}")
    if error.details:
        talk.print(error.details, markup=False)
    if error.hint:
        talk.print(f"\n[cyan]hint:[/] {escape(error.hint)}")


def _task(name: str) -> Any:
    tasks = ("generate", "tune", "embed")
    if name not in tasks:
        raise TightfitError(f"no task is called `{name}`", hint=near(name, tasks))
    return name


def _plan(
    model: str,
    workload: Workload,
    budget: Budget,
    quality: str,
    technique: list[str] | None,
    random_weights: bool,
    alternatives: bool = False,
) -> Plan:
    _quiet()
    from tightfit import verbs

    with talk.status(f"rehearsing {escape(model)}"):
        return verbs.plan(model, workload, budget, quality, technique or (), random_weights, None, alternatives)  # type: ignore[arg-type]


def _plan_prompt(
    model: str, prompt: str, chat: bool, new_tokens: int, budget: Budget, quality: str, technique: list[str] | None, random_weights: bool
) -> Plan:
    """The plan for exactly this prompt's length."""
    _quiet()
    from tightfit.describe.source import describe
    from tightfit.runtime.tokens import encode

    skeleton = describe(model, random_weights=random_weights)
    if not skeleton.origins and not random_weights:
        raise TightfitError(
            f"`{model}` is a preset: a shape without weights",
            hint="name a folder or a hub id that holds them, or run the shape with `--random-weights`, for memory and speed",
        )
    tokens = encode(skeleton, prompt, chat, new_tokens).length
    return _plan(model, Workload("generate", 1, tokens, new_tokens), budget, quality, technique, random_weights)


def _run(planned: Plan, prompt: str, chat: bool, as_json: bool, **sampling: Any) -> Any:
    _quiet()
    from tightfit import verbs
    from tightfit.runtime.generate import Sampling

    if not as_json:
        _show().show_plan(planned, talk)
    told: list[str] = []

    def listen(piece: str) -> None:
        text = piece if told else prompt + piece
        told.append(piece)
        sys.stdout.write(text)
        sys.stdout.flush()

    with _bar("loading", not as_json) as progress:
        report = verbs.run(planned, prompt, Sampling(**sampling), None if as_json else listen, progress, chat)
    if not as_json:
        out.print("" if told else f"(no tokenizer, so no text: {report.tokens} token ids were written)")
    return report


def _quiet() -> None:
    from tightfit.runtime.process import keep_heap_tight, keep_quiet

    keep_quiet()
    keep_heap_tight()


def _show() -> Any:
    from tightfit import show

    return show


def _print(values: dict[str, Any], as_json: bool) -> bool:
    """Print `values` if JSON was asked for; tells whether it did."""
    if as_json:
        print(json.dumps(values, default=list))
    return as_json


def _refuse_unwritable(file: str | None) -> None:
    """Said before the work, not after it."""
    if file and (os.path.isdir(file) or not os.access(os.path.dirname(file) or ".", os.W_OK)):
        raise TightfitError(f"cannot write `{file}`", hint="name a file in a folder that is there and yours to write")


def _write(file: str, values: dict[str, Any]) -> None:
    """Write JSON to a temporary name, then rename, so that no half file is ever seen."""
    partial = f"{file}.{os.getpid()}.partial"
    try:
        with open(partial, "w") as stream:
            json.dump(values, stream, indent=1, default=list)
        os.replace(partial, file)
    except OSError as error:
        if os.path.exists(partial):
            os.unlink(partial)
        raise TightfitError(f"cannot write `{file}`: {error.strerror}") from error


@contextmanager
def _bar(name: str, shown: bool) -> Iterator[Any]:
    """A progress bar over bytes or tokens on stderr; gone once the work is done."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=talk, transient=True, disable=not shown) as bars:
        job = bars.add_task(name, total=None)

        def progress(done: int, whole: int) -> None:
            bars.update(job, completed=done, total=whole, visible=done < whole)
            if done >= whole:
                bars.stop()

        yield progress
