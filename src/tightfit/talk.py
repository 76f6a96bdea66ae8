"""Talk: how the command line speaks. Data goes to stdout, talk to stderr; one JSON object, bars, files, and errors of one line."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from tightfit.terms.errors import TightfitError

out, talk = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)


def emit(values: Mapping[str, Any], as_json: bool) -> bool:
    """Print `values` if JSON was asked for; tells whether it did."""
    if as_json:
        print(json.dumps(values, default=list))
    return as_json


def refuse_unwritable(file: str | None) -> None:
    """Said before the work, not after it."""
    if file and (os.path.isdir(file) or not os.access(os.path.dirname(file) or ".", os.W_OK)):
        raise TightfitError(f"cannot write `{file}`", hint="name a file in a folder that is there and yours to write")


def write(file: str, values: Mapping[str, Any]) -> None:
    """Write JSON to a temporary name, then rename, so that no half file is ever seen."""
    partial = f"{file}.{os.getpid()}.partial"
    try:
        with open(partial, "w") as stream:
            json.dump(values, stream, indent=1, default=list)
        os.replace(partial, file)
    except OSError as error:
        if os.path.exists(partial):
            os.unlink(partial)
        raise TightfitError(f"cannot write `{file}`: {error.strerror}", hint="name another file, or make room") from error


@contextmanager
def bar(name: str, shown: bool, unit: Literal["bytes", "tokens", "samples", "steps", "layers"] = "bytes") -> Iterator[Any]:
    """A progress bar on stderr with what is done, and the time left; gone once the work is done. Call what it gives with (done, whole).

    A third word is told beside the name.
    """
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn(binary_units=True) if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=talk, transient=True, disable=not (shown and talk.is_terminal)) as bars:
        job = bars.add_task(name, total=None)

        def progress(done: int, whole: int, word: str = "") -> None:
            bars.update(job, description=f"{name} {word}".rstrip(), completed=done, total=whole, visible=done < whole)
            if done >= whole:
                bars.stop()

        yield progress


def complain(error: TightfitError) -> None:
    """One clear line, what is had and needed, and a hint."""
    talk.print(f"[red]error:[/] {escape(str(error))}")
    if error.details:
        talk.print(error.details, markup=False)
    if error.hint:
        talk.print(f"\n[cyan]hint:[/] {escape(error.hint)}")
