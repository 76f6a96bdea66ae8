"""Choose: rehearse every candidate, settle its blocks inside the budget, and take the fastest that fits.

It knows techniques only as values that it is given, and machines only as rates.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tightfit.contracts import Stage
from tightfit.formats.codec import as_if_on
from tightfit.formats.image import PIECE_BYTES, READERS
from tightfit.planner.candidates import Candidate, allowed, candidates
from tightfit.planner.explain import lacking, reasons, refusal
from tightfit.planner.outcome import Outcome, Request
from tightfit.planner.pace import pace
from tightfit.planner.residency import Residency, behind, least, settle
from tightfit.planner.spread import spread
from tightfit.planner.weigh import Weights, weigh
from tightfit.rehearse.rehearsal import rehearse
from tightfit.terms.errors import TightfitError
from tightfit.terms.footprint import Footprint, total
from tightfit.terms.machine import Machine
from tightfit.terms.plan import Plan, TurnedDown
from tightfit.terms.units import show_bytes
from tightfit.terms.workload import Workload

Tried = tuple[Candidate, Workload, Footprint, Weights]

SLOT_SLACK = 16 * 1024
"""Bytes that a slot is larger than its block, so that reads may begin and end on disk pages."""


def choose(request: Request, machine: Machine, available: Mapping[str, type[Any]]) -> Plan:
    """The fastest plan within the budget and the wished quality.

    Raises `DoesNotFit` before any weight is read, with what is missing by kind and what would help.
    """
    if request.workload.task == "tune":
        request.budget.refuse_several(
            "tuning", "name one GPU; `accelerate launch --num_processes 2` tunes on two, each with rows of its own"
        )
    request = _moving_blocks(request, available)
    found = candidates(request.workload, available, request.asked)
    wished = [candidate for candidate in found if allowed(candidate, request.quality, request.asked)]
    outcomes, failures = _split_until_easy(request, wished, machine)
    choice = [outcome for outcome in outcomes if outcome.residency is not None]
    if request.alternatives or not choice:
        least_split = min(choice, key=lambda outcome: outcome.pace.whole).workload if choice else _splits(request.workload)[-1]
        others, more = _try_all(request, [candidate for candidate in found if candidate not in wished], least_split)
        outcomes += _outcomes(request, others, _extras(outcomes) | _extras_of(others), machine)
        failures += more
    if not choice:
        raise refusal(request, outcomes)
    best = min(choice, key=lambda outcome: outcome.pace.whole)
    turned_down = [_turned_down(outcome, best, request) for outcome in outcomes if _is_worth_telling(outcome, best)]
    return _plan(request, best, machine, (*turned_down, *failures))


def _splits(workload: Workload) -> list[Workload]:
    """The batch at once, then in halves of halves, unless the micro-batch was said. Only tuning can be split."""
    if workload.task != "tune" or workload.micro_batch:
        return [workload]
    found, rows = [workload], workload.batch
    while rows > 1:
        rows = -(-rows // 2)
        found.append(replace(workload, micro_batch=rows))
    return found


def _split_until_easy(request: Request, wished: list[Candidate], machine: Machine) -> tuple[list[Outcome], list[TurnedDown]]:
    """Try the candidates on ever smaller micro-batches, until one runs with nothing recomputed or streamed: less would not be faster."""
    outcomes: list[Outcome] = []
    failures: list[TurnedDown] = []
    known: dict[tuple[str, ...], Weights] = {}
    for workload in _splits(request.workload):
        tried, failures = _try_all(request, wished, workload, known)
        known |= {candidate.names: weights for candidate, _, _, weights in tried}
        outcomes += _outcomes(request, tried, _extras(outcomes) | _extras_of(tried), machine)
        if any(outcome.residency and not outcome.residency.streamed and not outcome.candidate.recomputes() for outcome in outcomes):
            break
    return outcomes, failures


def _is_worth_telling(outcome: Outcome, best: Outcome) -> bool:
    """The other ways of the same split, and the same way in other splits."""
    return outcome is not best and (outcome.workload == best.workload or outcome.candidate == best.candidate)


def _moving_blocks(request: Request, available: Mapping[str, type[Any]]) -> Request:
    """The request with what was asked of streaming as its own; whether and which blocks stream follows from the budget."""
    moves = {name: settings for name, settings in request.asked.items() if name in available and available[name].stage == Stage.MOVE}
    for name, settings in moves.items():
        if "streamed" in settings:
            raise TightfitError(
                f"`{name}:streamed` is the planner's to choose", hint=f"leave it out, or edit `techniques.{name}.streamed` in a saved plan"
            )
        if (slots := settings.get("slots", request.slots)) < 2:
            raise TightfitError(f"`{name}:slots` is at least 2, not {slots}", hint="one slot runs while another is filled")
        request = replace(request, slots=slots)
    return replace(request, asked={name: settings for name, settings in request.asked.items() if name not in moves})


def _try_all(
    request: Request, found: list[Candidate], workload: Workload, known: Mapping[tuple[str, ...], Weights] | None = None
) -> tuple[list[Tried], list[TurnedDown]]:
    """What is known whatever the budget, and the candidates that this model does not take. What the user asked for must work.

    `known` are weights by the names of techniques: they do not depend on how a batch is split.
    """
    tried, failures = [], []
    for candidate in found:
        try:
            tried.append(_try(request, candidate, workload, (known or {}).get(candidate.names)))
        except TightfitError as error:
            if set(candidate.names) == set(request.asked):
                raise
            failures.append(TurnedDown(candidate.names, str(error)))
    return tried, failures


def _try(request: Request, left_open: Candidate, workload: Workload, known: Weights | None) -> Tried:
    skeleton, device = request.skeleton, "cuda" if request.budget.compute_tier == "gpu" else "cpu"
    candidate = left_open.settled(device)
    with as_if_on(device):
        footprint = rehearse(skeleton.meta_model, workload, candidate.techniques)
        weights = known or weigh(skeleton, candidate.techniques, request.random_weights, tuned=workload.task == "tune")
    return candidate, workload, footprint, weights


def _extras(outcomes: list[Outcome]) -> frozenset[str]:
    """What trying has loaded stays in the process that plans, and runs the plan at once."""
    return frozenset(extra for outcome in outcomes for extra in outcome.weights.extras)


def _extras_of(tried: list[Tried]) -> frozenset[str]:
    return frozenset(extra for *_, weights in tried for extra in weights.extras)


def _outcomes(request: Request, tried: list[Tried], extras: frozenset[str], machine: Machine) -> list[Outcome]:
    found = [
        _outcome(request, candidate, workload, footprint, replace(weights, extras=extras), machine)
        for candidate, workload, footprint, weights in tried
    ]
    if request.budget.compute_tier != "gpu" or request.budget.gpus < 2:
        return found
    caps = {"gpu": request.budget.gpu, "ram": request.budget.ram}
    rooms = [{tier: _room(machine, tier, cap, outcome.weights) for tier, cap in caps.items()} for outcome in found]
    return [spread(request, outcome, room, machine) for outcome, room in zip(found, rooms, strict=True)]


def _outcome(
    request: Request, candidate: Candidate, workload: Workload, footprint: Footprint, weights: Weights, machine: Machine
) -> Outcome:
    budget, fast = request.budget, request.budget.compute_tier
    room = {
        "gpu": _room(machine, "gpu", budget.gpu, weights) - weights.outside,
        "ram": _room(machine, "ram", budget.ram, weights) - (weights.passing if fast == "gpu" else weights.outside),
        "disk": budget.disk if weights.changed else 1 << 62,  # else blocks are read from where they are
    }
    beside = max(total(parts) - parts.get("weights", 0) for parts in footprint.phases.values())
    streams = workload.task != "tune" or (candidate.recomputes() and weights.take_turns)
    residency, lowest = _settle(weights, fast, room, request.slots, beside, streams)
    predicted = _predicted(request, footprint, weights, lowest, machine)
    needed = _needed(fast, predicted, weights, lowest, machine)
    expected = pace(footprint, weights, lowest, workload, budget, machine, candidate.names)
    return Outcome(candidate, workload, footprint, weights, residency, predicted, needed, expected)


def _settle(
    weights: Weights, fast: str, room: Mapping[str, int], slots: int, beside: int, streams: bool
) -> tuple[Residency | None, Residency]:
    """The residency inside `room`, if there is one; and it, or else that which asks least of the tiers that are too small."""
    staging = 0 if fast == "gpu" else weights.staging  # a GPU's readers have their buffers in RAM
    sizes = (slots, SLOT_SLACK, staging, beside, weights.load_scratch(fast))
    residency = settle(weights.blocks, fast, room, *sizes)
    if not streams:
        residency = None if residency is None or residency.streamed else residency
        return residency, residency or _all_on(fast, weights)
    lowest = residency or settle(weights.blocks, fast, behind(room, fast), *sizes) or least(weights.blocks, fast, room, *sizes)
    return residency, lowest


def _overhead(machine: Machine, tier: str, tensor_bytes: int, weights: Weights) -> int:
    """What no tensor shows; Python's own record of each trained tensor lies in RAM."""
    return machine.overhead(tier, tensor_bytes, weights.extras) + (weights.records if tier == "ram" else 0)


def _room(machine: Machine, tier: str, cap: int, weights: Weights) -> int:
    """Bytes that tensors may hold on `tier`, so that they and the overhead stay under `cap`."""
    fixed = _overhead(machine, tier, 0, weights)
    return int((cap - fixed) / (1 + machine.allocator_slack))


def _all_on(fast: str, weights: Weights) -> Residency:
    return Residency((fast,) * len(weights.blocks), (), 0, 0, sum(weights.blocks), sum(weights.blocks))


def _predicted(
    request: Request, footprint: Footprint, weights: Weights, residency: Residency, machine: Machine
) -> dict[str, dict[str, int]]:
    """Bytes by tier and kind at the peak."""
    fast = request.budget.compute_tier
    resting = weights.outside + residency.fast_bytes
    peak = max(footprint.phases.values(), key=lambda parts: total(parts) - parts.get("weights", 0))
    compute = {kind: size for kind, size in peak.items() if kind != "weights" and size} | {"weights": resting}
    predicted = {fast: {**compute, "overhead": _overhead(machine, fast, total(compute), weights)}}
    if fast == "gpu":
        pinned = sum(size for size, home in zip(weights.blocks, residency.homes, strict=True) if home == "ram")
        staging = READERS * PIECE_BYTES if "disk" in residency.homes else 0
        held = {"weights": pinned} | ({"workspace": staging} if staging else {})
        predicted["ram"] = {**held, "overhead": _overhead(machine, "ram", total(held), weights)}
    spilled = sum(size for size, home in zip(weights.blocks, residency.homes, strict=True) if home == "disk")
    if spilled and weights.changed:
        predicted["disk"] = {"weights": spilled}
    return predicted


def _needed(
    fast: str, predicted: Mapping[str, Mapping[str, int]], weights: Weights, residency: Residency, machine: Machine
) -> dict[str, Mapping[str, int]]:
    """As `predicted`, but at the highest moment of loading or running."""
    needed = dict(predicted)
    for tier, scratch in {"ram": weights.passing, fast: weights.load_scratch(fast)}.items():  # on a CPU the latter alone
        if tier in predicted:
            held = weights.outside + residency.loading_bytes if tier == fast else predicted[tier]["weights"]
            load = {"weights": held, "workspace": scratch}
            load |= {"overhead": _overhead(machine, tier, total(load), weights)}
            needed[tier] = max(predicted[tier], load, key=total)
    return needed


def _turned_down(outcome: Outcome, best: Outcome, request: Request) -> TurnedDown:
    names = outcome.candidate.names
    at_once = "" if outcome.workload == best.workload else f"{outcome.workload.rows} at a time: "
    if outcome.residency is None:
        tier = lacking(request, outcome)[0]
        return TurnedDown(names, f"{at_once}needs {show_bytes(total(outcome.needed[tier]))} on {tier}")
    ratio = best.pace.whole / outcome.pace.whole
    if not allowed(outcome.candidate, request.quality, request.asked):
        return TurnedDown(names, f"{at_once}would be {ratio:.1f}x as fast, but keeps only `{outcome.candidate.quality}` quality")
    return TurnedDown(names, f"{at_once}slower: {1 / ratio:.1f}x the time")


def _plan(request: Request, best: Outcome, machine: Machine, turned_down: tuple[TurnedDown, ...]) -> Plan:
    residency = best.residency
    assert residency is not None
    settings = dict(best.candidate.settings)
    if residency.streamed:
        settings["offload"] = {"streamed": residency.streamed, "slots": residency.slots}
    resting = best.weights.outside + residency.fast_bytes
    phases = {
        name: {**{kind: size for kind, size in parts.items() if size}, "weights": resting} for name, parts in best.footprint.phases.items()
    }
    scratch = best.weights.load_scratch(request.budget.compute_tier)
    phases = {"load": {"weights": best.weights.outside + residency.loading_bytes, "workspace": scratch}} | phases
    if best.spread:
        phases = {"load": {"weights": best.predicted["gpu"]["weights"], "workspace": scratch}} | dict(best.spread.phases)
    known = machine.probed and (request.budget.compute_tier == "ram" or machine.device == "cuda")
    notes = () if known else ("rates and overhead are guesses for an unknown machine; `tightfit probe` measures them",)
    notes += (best.left_idle,) if best.left_idle else ()
    return Plan(
        model=request.skeleton.name,
        workload=best.workload,
        budget=request.budget,
        quality=best.candidate.quality,
        techniques=settings,
        residency=residency.homes,
        predicted=best.predicted,
        phases=phases,
        seconds=best.pace.seconds,
        streamed_bytes=sum(best.weights.blocks[position] for position in residency.streamed),
        random_weights=request.random_weights,
        devices=best.spread.devices if best.spread else (),
        predicted_gpus=best.spread.predicted if best.spread else (),
        reasons=reasons(request, best),
        turned_down=turned_down,
        notes=notes,
    )
