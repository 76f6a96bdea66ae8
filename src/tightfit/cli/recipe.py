"""The command line's verb `recipe`: each recipe is a command of its own, whose options are the settings of its function."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from inspect import Parameter, getdoc, signature
from typing import Annotated, Any

import typer
from rich.markup import escape

from tightfit.catalog import explain, recipe, recipe_names
from tightfit.cli.options import LATER, Json, app, quiet, shown
from tightfit.recipes import Told
from tightfit.talk import bar, emit, out, refuse_unwritable, talk, write
from tightfit.terms.placement import PlaceReport
from tightfit.terms.quantizing import QuantizeReport
from tightfit.terms.report import Report
from tightfit.terms.units import show_bytes

_SEEDS = (1 << 32) - 1
"""The largest that NumPy takes."""

_AS_IN_TUNE = {"output": ("--output", "-o"), "held_out": ("--held-out", "--eval"), "learning_rate": ("--lr",)}
"""Settings that `tightfit tune` calls by other names than Python does, and theirs beside them where they are as plain."""


class _Recipes(typer.core.TyperGroup):
    """Commands that are found by their files, when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The catalogue's."""
        return recipe_names()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The recipe as a command. Raises `TightfitError` with near names for an unknown one."""
        inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        inner.command(cmd_name)(_command(cmd_name, recipe(cmd_name)))
        return typer.main.get_command(inner)


app.add_typer(
    typer.Typer(cls=_Recipes, no_args_is_help=True, pretty_exceptions_enable=False),
    name="recipe",
    help="Do what one paper did, with its settings; `tightfit explain NAME` tells what to expect.",
)


def _command(name: str, run: Callable[..., Report | QuantizeReport | PlaceReport]) -> Callable[..., None]:
    """What the command line calls: the recipe with the options that every verb has."""
    declared = signature(run, eval_str=True).parameters
    help_of = {setting["name"]: setting["price"] for setting in explain(name)["settings"]}

    def command(as_json: bool, save_report: str | None, **settings: Any) -> None:
        refuse_unwritable(save_report)
        quiet()
        with _listening(not as_json) as told:
            try:
                report = run(**settings, told=told)
            except KeyboardInterrupt:
                if "resume" not in declared:
                    raise
                talk.print(f"\ninterrupted; while work was left, `--resume` goes on from what was saved for {escape(settings['output'])}")
                sys.exit(LATER)
        emit(report.to_json(), as_json) or _tell(report, settings["output"])
        if save_report:
            write(save_report, report.to_json())

    own = [_option(parameter, help_of[parameter.name]) for parameter in declared.values() if parameter.annotation is not Told]
    saving = Annotated[str | None, typer.Option(help="Write the report to this file.", show_default=False)]
    more = [_given("as_json", Json, False), _given("save_report", saving, None)]
    command.__signature__ = signature(run).replace(parameters=[*own, *more], return_annotation=None)  # type: ignore[attr-defined]
    command.__annotations__, command.__doc__ = {}, getdoc(run)
    return command


def _option(parameter: Parameter, text: str) -> Parameter:
    """A setting as typer reads it: an argument where its place in the call says what it is, else an option."""
    names, least, text = _AS_IN_TUNE.get(parameter.name, ()), None, f"{text[:1].upper()}{text[1:]}."
    must = parameter.default is parameter.empty
    if type(parameter.default) in (int, float):
        least = min(parameter.default, 1) if type(parameter.default) is int else 0.0
    if must and parameter.kind is parameter.POSITIONAL_OR_KEYWORD and not names:
        return _given(parameter.name, Annotated[parameter.annotation, typer.Argument(help=text)], parameter.default)
    if parameter.annotation is bool:
        names = (f"--{parameter.name.replace('_', '-')}",)
    shows = not must and parameter.default is not None and parameter.annotation is not bool
    most = _SEEDS if parameter.name == "seed" else None
    option = typer.Option(*names, help=text, min=least, max=most, show_default=shows)
    return _given(parameter.name, Annotated[parameter.annotation, option], parameter.default)


def _given(name: str, annotation: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@contextmanager
def _listening(shows: bool) -> Iterator[Told]:
    """The plan, bars as soon as they have something to tell, some losses and what is found, on stderr."""
    with ExitStack() as opened:

        def first_told(name: str, unit: Any = "bytes") -> Callable[..., None]:
            found = cache(lambda: opened.enter_context(bar(name, shows, unit)))
            return lambda *words: found()(*words)

        learning = first_told("tuning", "steps")

        def learned(done: int, whole: int, loss: float) -> None:
            learning(done, whole, f"loss {loss:.4f}")
            if shows and done % max(1, whole // 10) == 0:
                talk.print(f"step {done} of {whole}   loss {loss:.4f}")

        yield Told(
            reading=first_told("reading", "samples"),
            planned=lambda plan: shown().show_plan(plan, talk) if shows else None,
            loading=first_told("loading"),
            learning=learned,
            solving=first_told("quantizing", "layers"),
            scoring=first_told("scoring", "tokens"),
            finding=lambda line: talk.print(line, markup=False) if shows else None,
        )


def _tell(report: Report | QuantizeReport | PlaceReport, output: str) -> None:
    """What came of it, one figure a line; bytes by their names."""
    for name, score in report.scores.items():
        told = show_bytes(int(score)) if name.endswith("_bytes") else f"{int(score)}" if score == int(score) else f"{score:.4f}"
        out.print(f"{name.replace('_', ' '):<24} {told}", markup=False)
    shown().show_report(report, talk)
    talk.print(f"saved in {escape(output)}; use it with `{escape(shown().use_of(report, output))}`")
