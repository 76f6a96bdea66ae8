"""Perform: placed steps run over processes, one core each, and held against what the simulator says of them.

What the simulator is given is measured in the same processes: the seconds of each operator by `profile`, and the link by messages of many
sizes, from the moment of sending to the moment when the reader has it. Nothing is fitted to the steps that are measured then.
"""

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch
import torch.distributed as dist
from splits import others
from torch import Tensor, multiprocessing, nn
from transformers import PreTrainedModel

from tightfit.describe.graph import Captured, graph_of
from tightfit.planner.placement.load import pipeline_order
from tightfit.planner.placement.m_etf import m_etf
from tightfit.planner.placement.m_topo import m_topo
from tightfit.planner.placement.place import place
from tightfit.planner.placement.simulate import simulate
from tightfit.rehearse.capture import record
from tightfit.rehearse.costs import profile
from tightfit.rehearse.replay import Replayed, bound, replay
from tightfit.runtime.perform import Performed, peak_bytes, perform, post, tags_of
from tightfit.runtime.shares import shares
from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.errors import DoesNotFit
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placement

Row = dict[str, Any]
PROCESSES = 2
LOOSE = 1 << 50


@dataclass(frozen=True)
class Bench:
    """What all ways of one model are measured with, in one process."""

    rank: int
    captured: Captured
    module: nn.Module
    inputs: Mapping[str, Tensor]
    wanted: Replayed  # what the step gives in one process
    repeats: int


def measured_row(settings: Mapping[str, Any], model: str, training: bool) -> Row:
    """One model: what it was profiled with, and for each way to place it the simulated and the measured step."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_process, (folder, dict(settings), model, training), nprocs=PROCESSES)
        return json.loads((Path(folder) / "row.json").read_text())


def real_step(model: str, settings: Mapping[str, Any], training: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of networks.py with random weights, the same in every process; `config` makes it smaller than its namesake."""
    given = dict(settings["models"][model])
    config = given.pop("config", {})
    on_paper, inputs = vars(networks)[model](training=training, **given)
    torch.manual_seed(0)
    if isinstance(on_paper, PreTrainedModel):
        on_paper.config.update(config)
        module = type(on_paper)(on_paper.config)
        words = on_paper.config.vocab_size
    else:
        module, words = type(on_paper)(), settings["words"]
    made = {name: torch.randint(words, x.shape) if x.dtype == torch.long else torch.rand(x.shape) for name, x in inputs.items()}
    return module, made


def _process(rank: int, folder: str, settings: Mapping[str, Any], model: str, training: bool) -> None:
    """One process, on a core of its own where there are enough."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    module, inputs = real_step(model, settings, training)
    tape = record(module, inputs, training)
    tape = replace(tape, calls=tuple(replace(call, workspace_bytes=0) for call in tape.calls))  # no storage shows the scratch of kernels
    captured = graph_of(tape, settings["grain"], gradients_stay=False)
    gc.collect()
    gc.disable()
    bench = Bench(rank, captured, module, inputs, _replayed(captured, module, inputs), settings["repeats"])
    row = _measured(bench, settings)
    if rank == 0:
        (Path(folder) / "row.json").write_text(json.dumps(row))
    dist.destroy_process_group()


def _replayed(captured: Captured, module: nn.Module, inputs: Any) -> Replayed:
    """In one process, with the random numbers that `perform` draws."""
    numbers = iter(range(len(captured.tape.calls)))

    def seeded(run: Callable[[], Any]) -> Any:
        torch.manual_seed(next(numbers))
        return run()

    return replay(captured.tape, bound(captured.tape, module, inputs), seeded)


def _measured(bench: Bench, settings: Mapping[str, Any]) -> Row:
    alone = _profiled(bench, together=False)
    together = _profiled(bench, together=True)
    link = _link(bench.rank, settings["message_bytes"], bench.repeats)
    ways = [_ways(alone, link, settings) if bench.rank == 0 else {}]
    dist.broadcast_object_list(ways)
    rows = {}
    for way, placement in ways[0].items():
        rows[way] = _way(bench, placement, link) | _simulated(alone, together, link, placement)
        rows[way]["ratio"] = rows[way]["simulated_seconds"] / rows[way]["measured_seconds"]
    return {
        "operators": len(alone.operators),
        "calls": len(bench.captured.tape.calls),
        "seconds_alone": alone.seconds,
        "seconds_together": together.seconds,
        "bytes_per_second": link.bytes_per_second,
        "latency_seconds": link.latency_seconds,
        "ways": rows,
        "median_error": statistics.median(abs(row["ratio"] - 1) for row in rows.values()),
    }


def _profiled(bench: Bench, together: bool) -> Graph:
    """The mean over the processes of what `profile` says in each: one after the other, or all at once, which share the memory's lanes."""
    for turn in range(1 if together else PROCESSES):
        dist.barrier()
        if together or turn == bench.rank:
            graph = profile(bench.captured, bench.module, bench.inputs, bench.repeats)
    seconds = _gathered([one.seconds for one in graph.operators])
    means = [statistics.mean(those) for those in zip(*seconds, strict=True)]
    return replace(graph, operators=tuple(replace(one, seconds=mean) for one, mean in zip(graph.operators, means, strict=True)))


def _link(rank: int, sizes: list[int], repeats: int) -> Link:
    """By weighted least squares, so that a message of any size is off by as small a share as can be; the mean of both directions."""
    seconds = [statistics.mean(_one_way(rank, size, sender, repeats) for sender in range(PROCESSES)) for size in sizes]
    lines = np.array([(1 / took, size / took) for size, took in zip(sizes, seconds, strict=True)])
    latency, per_byte = np.linalg.lstsq(lines, np.ones(len(sizes)), rcond=None)[0]
    return Link(1 / float(per_byte), max(0.0, float(latency)))


def _one_way(rank: int, size: int, sender: int, repeats: int) -> float:
    """Seconds from when a message is ready to when its reader has it: the median, after one that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        message = torch.zeros(size, dtype=torch.uint8)
        receiver = 1 - sender
        work = dist.irecv(message, sender) if rank == receiver else None
        start = _together()
        if work is None:
            work = dist.isend(message, receiver)
        assert work is not None, "this process is one of the group"
        work.wait()
        taken.append(_gathered(time.perf_counter() - start)[receiver])
    return statistics.median(taken[1:])


def _ways(graph: Graph, link: Link, settings: Mapping[str, Any]) -> dict[str, Placement]:
    """Placements to try, by name, of those that are found. `scarce`: neither device can hold all."""
    loose = Cluster(tuple(Device(f"process {at}", LOOSE) for at in range(PROCESSES)), link)
    one = Placement((0,) * len(graph.operators), tuple(range(len(graph.operators))), "one device")
    memory_bytes = int(simulate(graph, loose, one).peak_bytes[0] * settings["scarce"])
    scarce = replace(loose, devices=tuple(replace(device, memory_bytes=memory_bytes) for device in loose.devices))
    balanced = others(graph, loose)["balanced"]
    found = {
        "one device": one,
        "balanced": Placement(balanced, pipeline_order(graph, balanced), "balanced") if balanced else None,
        "m-TOPO": m_topo(graph, loose),
        "m-ETF": m_etf(graph, loose),
    }
    for way, cluster in (("place", loose), ("place, scarce", scarce)):
        with suppress(DoesNotFit):
            found[way] = place(graph, cluster, seconds=settings["place_seconds"]).placement
    return {way: placement for way, placement in found.items() if placement is not None}


def _simulated(alone: Graph, together: Graph, link: Link, placement: Placement) -> Row:
    """Seconds and bytes, with the profile of each process by itself; and seconds with that of all at once."""
    cluster = Cluster(tuple(Device(f"process {at}", LOOSE) for at in range(PROCESSES)), link)
    schedule = simulate(alone, cluster, placement)
    return {
        "by": placement.by,
        "simulated_seconds": schedule.makespan,
        "simulated_together_seconds": simulate(together, cluster, placement).makespan,
        "simulated_serial_seconds": simulate(alone, replace(cluster, serial=True), placement).makespan,
        "simulated_peak_bytes": list(schedule.peak_bytes),
    }


def _way(bench: Bench, placement: Placement, link: Link) -> Row:
    """One placement: the median step, and what a step by itself gives and holds."""
    tape, parts = bench.captured.tape, shares(bench.captured, placement, PROCESSES)
    tags, share = tags_of(parts), parts[bench.rank]
    tensors = bound(tape, bench.module, bench.inputs)
    weights = sum(tensors[at].untyped_storage().nbytes() for at in share.weights if tape.storages[at].kind != "constant")

    errors: list[float] = []

    def step(watched: bool = False) -> tuple[float, Performed]:
        arriving = post(share, tape, tags)
        start = _together()
        done = perform(share, tape, tensors, arriving, tags, watched)
        seconds = max(done.end.values(), default=start) - start
        errors.append(_error(done, bench.wanted) if watched else 0.0)
        done.results.clear()
        done.gradients.clear()
        return seconds, done

    _, watched = step(watched=True)
    runs = [
        _run_of(bench.captured.graph, link, placement, _gathered((seconds, done)))
        for seconds, done in (step() for _ in range(bench.repeats + 1))
    ]
    return {
        **{name: statistics.median(run[name] for run in runs[1:]) for name in runs[0]},
        "held_peak_bytes": [peak + size for peak, size in zip(peak_bytes(_gathered(watched)), _gathered(weights), strict=True)],
        "transfers": len(tags),
        "sent_bytes": sum(tape.storages[parcel.storage].size_bytes for parcel in tags),
        "largest_error": max(_gathered(errors[0])),
    }


def _run_of(graph: Graph, link: Link, placement: Placement, processes: list[tuple[float, Performed]]) -> dict[str, float]:
    """One step as measured, and as the simulator would have it if the operators took what they took in this very step."""
    taken = {at: end - done.start[at] for _, done in processes for at, end in done.end.items()}
    graph = replace(graph, operators=tuple(replace(one, seconds=taken[at]) for at, one in enumerate(graph.operators)))
    cluster = Cluster(tuple(Device(f"process {at}", LOOSE) for at in range(PROCESSES)), link)
    measured = max(seconds for seconds, _ in processes)
    return {
        "measured_seconds": measured,
        "operator_seconds": graph.seconds,
        "own_ratio": simulate(graph, cluster, placement).makespan / measured,
        "own_serial_ratio": simulate(graph, replace(cluster, serial=True), placement).makespan / measured,
    }


def _error(done: Performed, wanted: Replayed) -> float:
    """The largest difference from what one process gives, over the largest element; 0 if all are equal to the bit."""
    pairs = [(tensor, wanted.results[place]) for place, tensor in done.results.items()]
    pairs += [(tensor, wanted.gradients[name]) for name, tensor in done.gradients.items()]
    return max(
        (0.0 if torch.equal(one, other) else float((one - other).abs().max() / other.abs().max()) for one, other in pairs), default=0.0
    )


def _together() -> float:
    """A moment at which all processes go on: they share one clock, and this one lies a little ahead."""
    moment = torch.tensor([time.perf_counter() + 0.003], dtype=torch.float64)
    dist.barrier()
    dist.broadcast(moment, 0)
    while time.perf_counter() < moment.item():
        pass
    return moment.item()


def _gathered(value: Any) -> list[Any]:
    """Of every process."""
    values: list[Any] = [None] * PROCESSES
    dist.all_gather_object(values, value)
    return values
