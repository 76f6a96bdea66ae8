"""Options: the app, what several verbs take on the command line, and what each does first."""

from typing import Annotated, Any

import typer

from tightfit.terms.errors import TightfitError, near

app = typer.Typer(
    name="tightfit",
    help=__import__("tightfit").__doc__.split("\n")[0],
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

LATER = 130
"""The exit code of a run that was interrupted and can be resumed, as shells have it."""

Model = Annotated[str, typer.Argument(help="A folder, a preset (see `tightfit list`), or a Hugging Face id.", show_default=False)]
Size = Annotated[str | None, typer.Option(help="A size such as 6GiB or 6GB.", show_default=False)]
Gpus = Annotated[str | None, typer.Option(help="A size such as 6GiB; for several that are alike 2x24GiB.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Techniques = Annotated[
    list[str] | None, typer.Option("--technique", help="NAME or NAME:key=value,…; may be given again.", show_default=False)
]
QualityOption = Annotated[str, typer.Option(help="exact: stored precision; near: at least 4 bits; small: anything.")]
Random = Annotated[
    bool, typer.Option("--random-weights", help="Run the shape without its weights: for memory and speed, never for quality.")
]


def one_of(what: str, name: str, *known: str) -> Any:
    """`name`, if it is one of the `known` ones; `what` they are is for the message."""
    if name not in known:
        raise TightfitError(f"no {what} is called `{name}`", hint=near(name, known))
    return name


def given(call: typer.Context, *names: str) -> str:
    """Which of the options `names` were typed, as a person types them; empty where none was."""
    typed = [name for name in names if call.get_parameter_source(name).name == "COMMANDLINE"]  # type: ignore[union-attr]
    return ", ".join(f"`--{name.replace('_', '-')}`" for name in typed)


def quiet() -> None:
    """Before anything heavy is imported."""
    from tightfit.runtime.process import keep_heap_tight, keep_quiet

    keep_quiet()
    keep_heap_tight()


def shown() -> Any:
    """The room that draws plans and reports."""
    from tightfit import show

    return show
