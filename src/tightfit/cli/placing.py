"""The command line's verb of placing: `place`."""

import os
from typing import Annotated

import typer
from rich.markup import escape

from tightfit.cli.options import Json, Size, app, given, one_of, quiet, shown
from tightfit.data.graphs import GraphFile, read_graph
from tightfit.talk import emit, out, refuse_unwritable, talk, write
from tightfit.terms.cluster import lacks_memory
from tightfit.terms.errors import TightfitError
from tightfit.terms.placement import PlaceReport
from tightfit.terms.units import parse_size

_OF_A_MODEL = ("task", "batch", "context", "grain", "device_map")


@app.command("place")
def place_command(
    call: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A folder, a preset, or a Hugging Face id.", show_default=False)] = None,
    graph: Annotated[str, typer.Option(help="A graph of operators: JSON, or a profile of PipeDream.", show_default=False)] = "",
    devices: Annotated[str | None, typer.Option(help="4, 4x8GiB, or 2x8GiB,24GiB@1.5 (1.5 times as fast).", show_default=False)] = None,
    memory: Size = None,
    objective: Annotated[
        str, typer.Option(help="makespan: one step ends early; throughput: a pipeline's slowest stage is short.")
    ] = "makespan",
    link: Annotated[
        list[str] | None,
        typer.Option(help="12GB/s between any two devices, 0-1=50GB/s between two; may be given again.", show_default=False),
    ] = None,
    latency: Annotated[float, typer.Option(min=0, help="Seconds that each transfer takes beside its bytes.")] = 0.0,
    serial: Annotated[bool, typer.Option("--serial", help="A device sends or receives one tensor at a time.")] = False,
    seconds: Annotated[float, typer.Option(min=0, help="How long to look for something better.")] = 10.0,
    task: Annotated[str, typer.Option(help="Of a model: embed (one pass) or tune (with backward and AdamW).")] = "embed",
    batch: Annotated[int, typer.Option(min=1, help="Of a model: sequences at once.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Of a model: tokens of each.")] = 512,
    grain: Annotated[str, typer.Option(help="Of a model: block, module or operator.")] = "block",
    device_map: Annotated[
        str | None, typer.Option(help="Write a model's device map to this file, for `from_pretrained`.", show_default=False)
    ] = None,
    picture: Annotated[str | None, typer.Option(help="Draw the schedule and the memory to this .svg or .png.", show_default=False)] = None,
    as_json: Json = False,
    save_report: Annotated[str | None, typer.Option(help="Write the report to this file.", show_default=False)] = None,
) -> None:
    """Say which device runs which operator of a step, so that it ends early and every memory suffices."""
    _refuse_mixed(call, model, graph)
    if device_map and grain != "block":
        raise TightfitError("a device map is of a model's whole blocks", hint="leave `--grain` out")
    _refuse_files(device_map, save_report, picture)
    quiet()
    from tightfit.verbs import placing as verbs

    one_of("objective", objective, *verbs.OBJECTIVES)
    source = read_graph(graph) if graph else None
    size = parse_size(memory) if memory else source and source.memory_bytes
    cluster = verbs.read_cluster(verbs.default_devices(source, devices), size, link or (), latency, serial)
    _refuse_idle(call, source, devices)
    if serial and objective == "throughput":
        talk.print("`--serial` is about the schedule of one step: the loads that throughput counts stay the same", markup=False)
    with talk.status(f"placing {escape(model or graph)} on {len(cluster.devices)} devices"):
        if source:
            report = verbs.place(source, cluster, objective, seconds)
        else:
            from tightfit.describe.graph import GRAINS

            step = verbs.Step(batch, context, one_of("task", task, "embed", "tune") == "tune", one_of("grain", grain, *GRAINS))
            report = verbs.place_model(model or "", cluster, step, objective, seconds, True if device_map else None)
    _deliver(report, device_map, save_report, picture, as_json)


def _refuse_mixed(call: typer.Context, model: str | None, graph: str) -> None:
    """A model or a graph, and no option of the other."""
    if bool(graph) == bool(model):
        raise TightfitError(
            "place a model or a graph, not both" if graph else "place what?",
            hint="`tightfit place MODEL --devices 4x8GiB`, or `--graph FILE` in place of the model",
        )
    if graph and (named := given(call, *_OF_A_MODEL)):
        raise TightfitError(f"{named}: only for a model, not for `--graph`", hint="leave it out, or name a model")


def _refuse_files(device_map: str | None, save_report: str | None, picture: str | None) -> None:
    """What cannot be written is said before the work, and so are two answers in one file."""
    files = [file for file in (device_map, save_report, picture) if file]
    for file in files:
        refuse_unwritable(file)
    if len({os.path.realpath(file) for file in files}) < len(files):
        raise TightfitError("two answers cannot go to one file", hint="give `--device-map`, `--save-report` and `--picture` a name each")
    if picture:
        from tightfit.picture import refuse_picture

        refuse_picture(picture)


def _refuse_idle(call: typer.Context, source: GraphFile | None, devices: str | None) -> None:
    """Options that would change nothing are refused, not ignored."""
    if devices and given(call, "memory") and not lacks_memory(devices):
        raise TightfitError(f"`--memory` is for a bare count of devices, and `{devices}` tells the sizes", hint="leave one of them out")
    named = given(call, "link", "latency")
    if source and named and all(operator.transfer_seconds is not None for operator in source.graph.operators):
        raise TightfitError(f"{named}: the graph's file tells the seconds of every transfer", hint="leave it out")


def _deliver(report: PlaceReport, device_map: str | None, save_report: str | None, picture: str | None, as_json: bool) -> None:
    """Files first, so that none is lost where nobody reads on, and the picture after those that cannot fail to be drawn."""
    if device_map:
        write(device_map, report.device_map or {})
    if save_report:
        write(save_report, report.to_json())
    try:
        if picture:
            from tightfit.picture import draw_schedule

            draw_schedule(report, picture)
    finally:
        emit(report.to_json(), as_json) or shown().show_report(report, out)
