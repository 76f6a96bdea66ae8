"""Performing: captured steps run over two processes, by placements drawn at random, and what each process saw."""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from captures import example, recorded

from tightfit.describe.graph import Captured, graph_of
from tightfit.planner.placement.orders import topological
from tightfit.rehearse.replay import Replayed, bound, replay
from tightfit.runtime.perform import Performed, perform, post, tags_of
from tightfit.runtime.shares import shares
from tightfit.terms.placement import Placement

DEVICES = 2


@dataclass(frozen=True)
class Case:
    """A step, how fine its operators are, and the seed of its placement; below zero: all on the last device."""

    name: str
    training: bool
    grain: str
    seed: int


@dataclass(frozen=True)
class Seen:
    """What one process saw of a case: moments and bytes, what it gave, and how far that is from the replay in one process."""

    performed: Performed
    gives: frozenset[int | str]
    error: float


def captured_of(case: Case) -> Captured:
    """Without the scratch of kernels, which no storage shows."""
    tape = recorded(case.name, case.training)
    return graph_of(replace(tape, calls=tuple(replace(call, workspace_bytes=0) for call in tape.calls)), case.grain, gradients_stay=False)


def placement_of(case: Case, captured: Captured) -> Placement:
    """Each group anywhere, in any topological order."""
    draw = random.Random(case.seed)
    device_of = [DEVICES - 1] * len(captured.graph.operators)
    for members in captured.graph.groups if case.seed >= 0 else ():
        home = draw.randrange(DEVICES)
        for at in members:
            device_of[at] = home
    ranks = [(draw.randrange(1000), at) for at in range(len(device_of))]
    return Placement(tuple(device_of), topological(captured.graph, ranks.__getitem__), "random")


def replayed(case: Case, captured: Captured) -> Replayed:
    """In one process, with the random numbers of `perform`."""
    seeds: Iterator[int] = iter(range(len(captured.tape.calls)))

    def seeded(run):
        torch.manual_seed(next(seeds))
        return run()

    return replay(captured.tape, bound(captured.tape, *example(case.name)), seeded)


def run(rank: int, folder: str, cases: list[Case]) -> None:
    """One process: all cases, what it saw of each into a file."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=DEVICES)
    torch.save([_seen(rank, case) for case in cases], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _seen(rank: int, case: Case) -> Seen:
    captured = captured_of(case)
    parts = shares(captured, placement_of(case, captured), DEVICES)
    tags, tensors = tags_of(parts), bound(captured.tape, *example(case.name))
    arriving = post(parts[rank], captured.tape, tags)
    dist.barrier()
    done = perform(parts[rank], captured.tape, tensors, arriving, tags, watched=True)
    wanted = replayed(case, captured)
    errors = [_error(tensor, wanted.results[place]) for place, tensor in done.results.items()]
    errors += [_error(tensor, wanted.gradients[name]) for name, tensor in done.gradients.items()]
    gives = frozenset((*done.results, *done.gradients))
    done.results.clear()
    done.gradients.clear()
    return Seen(done, gives, max(errors, default=0.0))


def _error(one: torch.Tensor, other: torch.Tensor) -> float:
    return 0.0 if torch.equal(one, other) else float((one - other).abs().max() / other.abs().max())
