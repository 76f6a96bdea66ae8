"""The command line's verb of placing: `place`."""

from typing import Annotated

import typer
from rich.markup import escape

from tightfit.cli.options import Json, Size, app, one_of, quiet, shown
from tightfit.talk import emit, out, refuse_unwritable, talk, write
from tightfit.terms.errors import TightfitError
from tightfit.terms.units import parse_size

OBJECTIVES = ("makespan", "throughput")
GRAINS = ("block", "module", "operator")


@app.command("place")
def place_command(
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
    if bool(graph) == bool(model):
        raise TightfitError("place what?", hint="`tightfit place MODEL --devices 4x8GiB`, or `--graph FILE` in place of the model")
    one_of("objective", objective, *OBJECTIVES)
    if device_map and (graph or one_of("grain", grain, *GRAINS) != "block"):
        raise TightfitError("a device map is of a model's whole blocks", hint="leave `--graph` and `--grain` out")
    for file in (save_report, picture, device_map):
        refuse_unwritable(file)
    if picture:
        from tightfit.picture import draw_schedule, refuse_picture

        refuse_picture(picture)
    quiet()
    from tightfit.data.graphs import read_graph
    from tightfit.verbs import placing as verbs

    source = read_graph(graph) if graph else None
    size = parse_size(memory) if memory else source and source.memory_bytes
    cluster = verbs.read_cluster(verbs.default_devices(source, devices), size, link or (), latency, serial)
    with talk.status(f"placing {escape(model or graph)} on {len(cluster.devices)} devices"):
        if source:
            report = verbs.place(source, cluster, objective, seconds)
        else:
            step = verbs.Step(batch, context, one_of("task", task, "embed", "tune") == "tune", one_of("grain", grain, *GRAINS))
            report = verbs.place_model(model or "", cluster, step, objective, seconds)
    emit(report.to_json(), as_json) or shown().show_report(report, out)
    if picture:
        draw_schedule(report, picture)
    if device_map:
        write(device_map, report.device_map or {})
    if save_report:
        write(save_report, report.to_json())
