"""Spread: the blocks of a model on several GPUs that are alike, where one would have to stream them.

A token goes through the blocks one after the other, so several GPUs bring memory and no speed: the best is few changes from one to the
next, and a lone GPU that holds everything is never slower. What is placed is a chain of the planner's own figures (what a block weighs,
with its part of the cache), priced as one sequence (`makespan`); recording every operator would say the same and take many seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from torch import nn

from tightfit.contracts import Beside
from tightfit.describe.blocks import block_lists, blocks_of, signature
from tightfit.planner.outcome import Outcome, Request, Spread
from tightfit.planner.pace import Pace, pace
from tightfit.planner.placement.place import place
from tightfit.planner.residency import Residency
from tightfit.planner.weigh import tensor_bytes
from tightfit.rehearse.rehearsal import rehearse
from tightfit.rehearse.thin import landmarks, thinned
from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.errors import DoesNotFit
from tightfit.terms.footprint import Footprint, total
from tightfit.terms.graph import Graph, Operator
from tightfit.terms.machine import Machine
from tightfit.terms.units import show_bytes
from tightfit.terms.workload import Workload

OUTSIDE = "outside"
"""The group of what belongs to no block."""


@dataclass(frozen=True)
class Parts:
    """What must find a place: bytes of each block, of its part of the cache, and of what belongs to no block."""

    blocks: tuple[int, ...]
    cache: Mapping[str, list[int]]  # of each block while the prompt is read (`prefill`) and while text is written (`decode`)
    outside: int
    stacks: tuple[int, ...]  # blocks of each

    @property
    def sizes(self) -> list[int]:
        """Of each block with the most that it keeps in the cache."""
        return [block + max((kept[at] for kept in self.cache.values()), default=0) for at, block in enumerate(self.blocks)]


def spread(request: Request, alone: Outcome, room: Mapping[str, int], machine: Machine) -> Outcome:
    """The outcome `alone` on one GPU, or with its blocks on several where that is faster or the only way; else with the reason why not.

    `room` is what tensors may hold on each GPU (`gpu`), and in RAM (`ram`).
    """
    if alone.residency is not None and not alone.residency.streamed:
        return replace(alone, left_idle="one GPU holds all blocks: more would not be faster")
    if alone.weights.passing > room["ram"]:
        return alone  # weights pass through RAM on their way to any GPU
    parts, gpus = parts_of(request, alone), request.budget.gpus
    if parts is None:
        return replace(alone, left_idle="one GPU is used: the blocks of this model do not work on several")
    first, other = (room["gpu"] - size for size in beside(alone.footprint, alone.weights.load_scratch("gpu")))
    devices = place_blocks(parts.sizes, first - parts.outside, other, gpus, _transfer_seconds(request, machine))
    if devices is None:
        return replace(alone, left_idle=_too_few(gpus, sum(parts.sizes), first - parts.outside + (gpus - 1) * other))
    found = _outcome(request, alone, parts, devices, machine)
    if alone.residency is not None and found.pace.whole >= alone.pace.whole:
        return replace(alone, left_idle="one GPU is used: blocks on several would not be faster")
    return found


def parts_of(request: Request, alone: Outcome) -> Parts | None:
    """The model's parts as they are with the outcome's techniques; None where its blocks cannot part."""
    cache = cache_bytes(request.skeleton.meta_model(), alone.workload)
    model = request.skeleton.meta_model().requires_grad_(False)
    for technique in sorted(alone.candidate.techniques, key=lambda technique: technique.stage):
        technique.apply(model)
    if cache is None or not _can_part(model):
        return None
    blocks = tuple(_bytes(block) for _, block in blocks_of(model))
    return Parts(blocks, cache, _bytes(model) - sum(blocks), tuple(len(stack) for _, stack in block_lists(model)))


def cache_bytes(model: nn.Module, workload: Workload) -> dict[str, list[int]] | None:
    """The most that each block of the meta `model` keeps in the cache, by stem of the phases; one block of each kind is rehearsed.

    Encoders keep nothing, so the blocks that do are those of the last stack; None where the landmarks together say otherwise.
    """
    if workload.task != "generate":
        return {}
    stacks = [[signature(block) for block in stack] for _, stack in block_lists(model)]
    *ahead, marks = [set(landmarks(kinds)) for kinds in stacks]
    first = {kind: place for place, kind in reversed(list(enumerate(stacks[-1])))}

    def kept(places: set[int]) -> dict[str, int]:
        return _most_cache(rehearse(partial(thinned, model, [*ahead, places]), workload))

    single, together = {kind: kept({place}) for kind, place in first.items()}, kept(marks)
    if any(abs(sum(single[stacks[-1][place]][stem] for place in marks) - most) > most // 50 for stem, most in together.items()):
        return None
    none = [0] * sum(len(kinds) for kinds in stacks[:-1])
    return {stem: none + [single[kind][stem] for kind in stacks[-1]] for stem in together}


def beside(footprint: Footprint, scratch: int) -> tuple[int, int]:
    """Bytes that are needed beside weights and cache on GPU 0, where embedding and head are, and on each other one.

    While weights are read, the `scratch` of encoding them is there in place of activations.
    """
    held = {name: total(sizes) - sizes.get("weights", 0) - sizes.get("kv_cache", 0) for name, sizes in footprint.phases.items()}
    inside = max([scratch, *(size for name, size in held.items() if _runs_blocks(name))])
    return max(inside, *held.values()), inside


def place_blocks(sizes: Sequence[int], first: int, other: int, gpus: int, seconds: float) -> tuple[int, ...] | None:
    """The GPU of each block, of `sizes` bytes, in `first` bytes on GPU 0 and `other` on each further one; None where they do not fit.

    Hidden states take `seconds` from one GPU to another, from GPU 0 to the first block, and from the last one back there. GPUs that are
    alike have no numbers of their own: what stands outside weighs what GPU 0 has less, and where it goes is GPU 0.
    """
    if other <= 0 or first < 0:
        return None
    begin, end = (Operator(name, 0.0, size, group=OUTSIDE, transfer_seconds=seconds) for name, size in (("in", other - first), ("out", 0)))
    blocks = [Operator(f"block {position}", 0.0, size, transfer_seconds=seconds) for position, size in enumerate(sizes)]
    graph = Graph("blocks", (begin, *blocks, end), tuple(pairwise(range(len(blocks) + 2))))
    cluster = Cluster(tuple(Device(f"gpu {number}", other) for number in range(gpus)), Link(1.0))
    try:
        device_of = place(graph, cluster, "makespan", seconds=0).placement.device_of
    except DoesNotFit:
        return None
    numbers = {device: number for number, device in enumerate(dict.fromkeys(device_of))}
    return tuple(numbers[device] for device in device_of[1:-1])


def changes_of(devices: Sequence[int], stacks: Sequence[int]) -> list[int]:
    """How often the hidden states change the GPU in each of the `stacks` (numbers of blocks): they come from GPU 0, and go back there.

    >>> changes_of([0, 0, 1, 1], [4])
    [2]
    """
    found, begin = [], 0
    for count in stacks:
        found.append(sum(one != other for one, other in pairwise((0, *devices[begin : begin + count], 0))))
        begin += count
    return found


def _can_part(model: nn.Module) -> bool:
    """Whether every weight belongs to one block, or to none, and nothing runs beside the blocks."""
    owners: dict[int, set[str]] = {}
    starts = [f"{path}." for path, _ in blocks_of(model)]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(next((start for start in starts if name.startswith(start)), ""))
    return all(len(found) == 1 for found in owners.values()) and not any(isinstance(module, Beside) for module in model.modules())


def _bytes(module: nn.Module) -> int:
    return sum(tensor_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))


def _most_cache(footprint: Footprint) -> dict[str, int]:
    """The most that the cache holds, by stem of the phases (`prefill` of `prefill: stack 0 first block`)."""
    found: dict[str, int] = {}
    for name, sizes in footprint.phases.items():
        stem = _stem(name)
        found[stem] = max(found.get(stem, 0), sizes.get("kv_cache", 0))
    return found


def _stem(phase: str) -> str:
    return phase.split(":")[0]


def _runs_blocks(phase: str) -> bool:
    """Whether the phase is one of blocks, which run on any GPU; all others run on GPU 0."""
    return ": stack " in phase


def _transfer_seconds(request: Request, machine: Machine, tokens: int = 0) -> float:
    """What the hidden states of `tokens` tokens (0: all that are read) of each row take from one GPU to another."""
    width = request.skeleton.config.get_text_config().hidden_size
    size = request.workload.rows * (tokens or request.workload.tokens) * width * request.skeleton.dtype.itemsize
    return machine.operation_seconds + size / machine.link_bandwidth


def _outcome(request: Request, alone: Outcome, parts: Parts, devices: tuple[int, ...], machine: Machine) -> Outcome:
    """The outcome with all blocks resident on their GPUs."""
    extras, used = alone.weights.extras, max(0, *devices) + 1
    phases = [_phases_on(number, alone.footprint, parts, devices) for number in range(used)]
    peaks = [max(held.values(), key=total) for held in phases]
    predicted = tuple({**peak, "overhead": machine.overhead("gpu", total(peak), extras)} for peak in peaks)
    fullest = max(range(used), key=lambda number: total(predicted[number]))
    resting = sum(alone.weights.blocks)
    residency = Residency(("gpu",) * len(devices), (), 0, 0, resting, resting)
    changes = changes_of(devices, parts.stacks)
    paced = _paced(request, alone, residency, changes, machine)
    times = alone.pace.whole / paced.whole if alone.residency is not None else None
    tiers = {"gpu": predicted[fullest], "ram": {"weights": 0, "overhead": machine.overhead("ram", 0, extras)}}
    found = Spread(devices, predicted, phases[fullest], sum(changes), times)
    return replace(alone, residency=residency, predicted=tiers, needed=tiers, pace=paced, spread=found)


def _phases_on(number: int, footprint: Footprint, parts: Parts, devices: Sequence[int]) -> dict[str, dict[str, int]]:
    """What GPU `number` holds in each phase that runs there, by kind; of the cache the most that its blocks keep meanwhile."""
    mine = [position for position, device in enumerate(devices) if device == number]
    weights = sum(parts.blocks[position] for position in mine) + (parts.outside if number == 0 else 0)
    kept = {stem: sum(sizes[position] for position in mine) for stem, sizes in parts.cache.items()}
    found = {}
    for name, sizes in footprint.phases.items():
        if number == 0 or _runs_blocks(name):
            held = {kind: size for kind, size in sizes.items() if size} | {"weights": weights, "kv_cache": kept.get(_stem(name), 0)}
            found[name] = {kind: size for kind, size in held.items() if size or kind == "weights"}
    return found


def _paced(request: Request, alone: Outcome, residency: Residency, changes: Sequence[int], machine: Machine) -> Pace:
    """As one GPU that had room for all, and the hidden states on their way."""
    work, candidate = alone.workload, alone.candidate
    found = pace(alone.footprint, alone.weights, residency, work, request.budget, machine, candidate.names)
    prompt, one = (_transfer_seconds(request, machine, tokens) for tokens in (work.tokens, 1))
    more = {"step": sum(changes) * prompt}
    if work.task == "generate":
        last = one if request.skeleton.config.is_encoder_decoder else prompt
        more = {"prefill": sum(changes[:-1]) * prompt + changes[-1] * last, "token": changes[-1] * one}
    seconds = {name: took + more.get(name, 0.0) for name, took in found.seconds.items()}
    later = max(0, work.new_tokens - 1) * more.get("token", 0.0)
    return replace(found, seconds=seconds, whole=found.whole + more.get("step", 0.0) + more.get("prefill", 0.0) + later)


def _too_few(gpus: int, needed: int, room: int) -> str:
    """Why blocks do not fit on GPUs that have so much room for them."""
    if room < needed:
        return f"{gpus} GPUs together hold {show_bytes(max(0, room))} of the {show_bytes(needed)} that all blocks need: one streams them"
    return f"{gpus} GPUs have room for {show_bytes(room)} of blocks, but not for whole ones: one streams them"
