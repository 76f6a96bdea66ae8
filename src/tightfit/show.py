"""Show: plans and reports as a person reads them: a memory map, few words, one line each."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import singledispatch

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tightfit.terms.footprint import KINDS, total
from tightfit.terms.placement import PlaceReport
from tightfit.terms.plan import Plan
from tightfit.terms.quantizing import QuantizePlan, QuantizeReport
from tightfit.terms.report import Report
from tightfit.terms.units import show_bytes, show_seconds

_COLORS = {
    "weights": "blue",
    "gradients": "magenta",
    "optimizer": "red",
    "activations": "green",
    "kv_cache": "cyan",
    "workspace": "yellow",
    "overhead": "bright_black",
}
_WIDTH = 56
_NARROW = 16


@singledispatch
def show_plan(plan: Plan, console: Console) -> None:
    """The plan: what is done, where blocks rest, a map of each tier, the pace, and why."""
    work = plan.workload
    doing = {
        "generate": f"read {work.tokens} tokens, write {work.new_tokens}",
        "tune": f"one step over {work.batch} × {work.tokens} tokens"
        + (f", {work.rows} at a time" if work.passes > 1 else "")
        + f", {work.optimizer}",
        "embed": f"one pass over {work.batch} × {work.tokens} tokens",
    }[work.task]
    console.print(f"[bold]{escape(plan.model)}[/]: {doing}")
    names = [name for name in plan.techniques] or ["as it is stored"]
    console.print(f"  techniques  {', '.join(names)} (quality {plan.quality})")
    console.print(Text("  blocks      ") + _block_map(plan))
    for name, tier, parts in _holders(plan):
        console.print(Text(f"  {name:<11} ") + _bar(parts, plan.budget.bytes_of(tier)))
        console.print(f"              {show_bytes(total(parts))} of {show_bytes(plan.budget.bytes_of(tier))}: {_kinds(parts)}")
    console.print(f"  pace        {_pace(plan)}")
    for reason in plan.reasons:
        console.print(f"  because     {escape(reason)}")
    for other in plan.turned_down:
        console.print(f"  [bright_black]not taken   {' + '.join(other.techniques) or 'as stored'}: {escape(other.reason)}[/]")
    for note in plan.notes:
        console.print(f"  [yellow]note        {escape(note)}[/]")


@show_plan.register
def _(plan: QuantizePlan, console: Console) -> None:
    settings = ", ".join(f"{key}={value}" for key, value in plan.settings.items())
    console.print(f"[bold]{escape(plan.model)}[/]: {plan.layers} layers to {plan.bits_per_weight:.2f} bits a weight with {plan.technique}")
    console.print(f"  settings    {settings or 'as they are by default'}")
    if plan.samples * plan.tokens > 1:
        home = "" if plan.states_on == "ram" else "; hidden states rest on the disk"
        console.print(f"  reads       {plan.samples} × {plan.tokens} tokens, {plan.rows} at a time{home}")
    tier = plan.budget.compute_tier
    kinds = ", ".join(f"{kind} {show_bytes(size)}" for kind, size in plan.predicted.items() if size)
    console.print(f"  {tier:<11} {show_bytes(plan.predicted_bytes)} of {show_bytes(plan.budget.bytes_of(tier))}: {kinds}")
    console.print(f"  writes      {show_bytes(plan.output_bytes)}")
    for note in plan.notes:
        console.print(f"  [yellow]note        {escape(note)}[/]")


@singledispatch
def show_report(report: Report, console: Console) -> None:
    """The report: measured against planned kind by kind, the process by the kernel's count, and the pace."""
    plan = report.plan
    predicted = {kind: size for kind, size in plan.predicted[plan.compute_tier].items() if kind != "overhead"}
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    for name in ("", "planned", "measured", "off"):
        table.add_column(name, justify="left" if not name else "right")
    for kind in KINDS:
        if predicted.get(kind) or report.measured.get(kind):
            table.add_row(*_against(kind, predicted.get(kind, 0), report.measured.get(kind, 0), total(predicted) // 100))
    table.add_row(*_against("all tensors", total(predicted), report.measured_bytes, 0), style="bold")
    run_peak, budget = report.process["run_peak"], plan.budget.ram
    table.add_row("process", show_bytes(plan.predicted_bytes("ram")), show_bytes(run_peak), f"budget {show_bytes(budget)}")
    console.print(table)
    seconds = report.seconds
    if plan.workload.task == "tune":
        pace = f"first step {show_seconds(seconds['first_step'])}, then {show_seconds(seconds['step'])} a step"
    else:
        pace = f"first token after {show_seconds(seconds['first_token'])}, then {show_seconds(seconds['per_token'])} a token"
    console.print(
        f"loaded in {show_seconds(seconds['load'])} (peak {show_bytes(report.process['load_peak'])}), {pace}"
        + (f"; {show_bytes(report.moved_bytes)} streamed" if report.moved_bytes else "")
    )
    for note in report.notes:
        console.print(f"[bright_black]{escape(note)}[/]")
    for warning in report.warnings:
        console.print(f"[yellow]warning: {warning}[/]")
    if not report.warnings:
        console.print(f"[green]kept its word: inside the budget, {report.deviation:+.1%} off the plan[/]")


@show_report.register
def _(report: QuantizeReport, console: Console) -> None:
    plan = report.plan
    console.print(
        f"{escape(report.output)}: {show_bytes(plan.output_bytes)}, {plan.bits_per_weight:.2f} bits a weight in {plan.layers} layers, "
        f"in {show_seconds(report.seconds)} ({plan.weights / report.seconds / 1e6:.2f} million weights a second)"
    )
    console.print(f"process {show_bytes(report.peak_bytes)} at the peak; planned {show_bytes(plan.predicted_bytes)}")
    for note in report.notes:
        console.print(f"[bright_black]{escape(note)}[/]")
    for warning in report.warnings:
        console.print(f"[yellow]warning: {warning}[/]")


@show_report.register
def _(report: PlaceReport, console: Console) -> None:
    graph, placed = report.graph, report.placed
    console.print(f"[bold]{escape(graph.name)}[/]: {len(graph.operators)} operators on {len(report.cluster.devices)} devices")
    found = {
        "makespan": f"a step takes {show_seconds(placed.seconds)}",
        "throughput": f"a sample leaves every {show_seconds(placed.seconds)}",
    }
    bound = f"no {placed.rivals} is below {show_seconds(placed.bound_seconds)}: {placed.bound_by}"
    by = f"by {placed.placement.by}, {placed.standing} ({bound}), in {show_seconds(placed.place_seconds)}"
    console.print(f"  found       {found[placed.objective]}, {by}")
    table = Table(box=None, pad_edge=False, show_header=True, header_style="bold")
    what = "blocks" if report.block_devices else "operators"
    for name in ("  device", what, "load", "memory at the peak", ""):
        table.add_column(name, justify="left" if name in ("  device", "") else "right")
    for number, (device, peak, load) in enumerate(zip(report.cluster.devices, placed.peak_bytes, report.loads, strict=True)):
        share = round(_NARROW * peak / device.memory_bytes)
        table.add_row(
            f"  {device.name}",
            _stretches(report.block_devices, number) if report.block_devices else str(placed.placement.device_of.count(number)),
            show_seconds(load),
            f"{show_bytes(peak)} of {show_bytes(device.memory_bytes)}",
            Text("■" * share, style="blue").append("·" * (_NARROW - share), style="bright_black"),
        )
    console.print(table)
    for name, seconds in placed.tried.items():
        told = "no placement that fits" if seconds is None else show_seconds(seconds)
        console.print(f"  [bright_black]tried       {escape(name)}: {told}[/]")
    for note in report.notes:
        console.print(f"  [bright_black]note        {escape(note)}[/]")


def _stretches(devices: Sequence[int], wanted: int) -> str:
    """The positions of the blocks on one device, as `0-12, 20`."""
    found: list[list[int]] = []
    for position, device in enumerate(devices):
        if device == wanted:
            if found and found[-1][1] == position - 1:
                found[-1][1] = position
            else:
                found.append([position, position])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in found) or "-"


@singledispatch
def use_of(report: Report, folder: str) -> str:
    """The command that goes on with the `folder` in which the work left what it made."""
    return f"tightfit run {report.plan.model} --adapter {folder} --prompt …"


@use_of.register
def _(report: QuantizeReport, folder: str) -> str:
    return f"tightfit run {folder} --prompt …"


@use_of.register
def _(report: PlaceReport, folder: str) -> str:
    return f"jq .assignment {folder}"


def _against(name: str, planned: int, measured: int, least: int) -> tuple[str, str, str, str]:
    """A row; no share is told for a kind of fewer than `least` bytes, where it would say nothing."""
    off = f"{measured / planned - 1:+.1%}" if max(planned, measured) > least and planned else ""
    return name, show_bytes(planned), show_bytes(measured), off


def _block_map(plan: Plan) -> Text:
    """One sign a block: full where it stays, light where it streams; long models are sampled to the width."""
    signs = {"gpu": ("█", "blue"), "ram": ("█" if plan.compute_tier == "ram" else "▒", "cyan"), "disk": ("░", "yellow")}
    homes = plan.residency
    shown = homes if len(homes) <= _WIDTH else [homes[place * len(homes) // _WIDTH] for place in range(_WIDTH)]
    text = Text()
    for home in shown:
        text.append(*signs[home])
    on_gpus = {f"gpu {number}": count for number, count in sorted(Counter(plan.devices).items())}
    counts = ", ".join(f"{count} on {where}" for where, count in (on_gpus or plan.resting()).items())
    return text.append(f"  {counts}")


def _holders(plan: Plan) -> Iterator[tuple[str, str, Mapping[str, int]]]:
    """What is shown with a map: each tier, and of several GPUs each, under its name."""
    for tier, parts in plan.predicted.items():
        if tier == "gpu" and plan.predicted_gpus:
            yield from ((f"gpu {number}", tier, held) for number, held in enumerate(plan.predicted_gpus))
        else:
            yield tier, tier, parts


def _bar(parts: Mapping[str, int], budget: int) -> Text:
    """The tier's budget as a bar, each kind in its colour, what is left as dots."""
    text, used, drawn = Text(), 0, 0
    for kind in KINDS:
        used += parts.get(kind, 0)
        upto = min(_WIDTH, round(_WIDTH * used / max(1, budget)))
        text.append("■" * (upto - drawn), style=_COLORS[kind])
        drawn = max(drawn, upto)
    return text.append("·" * (_WIDTH - drawn), style="bright_black")


def _kinds(parts: Mapping[str, int]) -> str:
    return "  ".join(f"[{_COLORS[kind]}]{kind}[/] {show_bytes(parts[kind])}" for kind in KINDS if parts.get(kind))


def _pace(plan: Plan) -> str:
    names: Iterable[tuple[str, str]] = (("load", "to load"), ("prefill", "for the prompt"), ("token", "a token"), ("step", "a step"))
    return ", ".join(f"{show_seconds(plan.seconds[name])} {words}" for name, words in names if name in plan.seconds)
