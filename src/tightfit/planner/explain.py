"""Explain: why a plan was taken, and what a refusal should say. Words only; the figures come from the outcomes."""

from collections import Counter

from tightfit.planner.candidates import allowed
from tightfit.planner.outcome import Outcome, Request, Spread
from tightfit.terms.errors import DoesNotFit
from tightfit.terms.footprint import KINDS, total
from tightfit.terms.units import enough, show_bytes, show_seconds


def reasons(request: Request, best: Outcome) -> tuple[str, ...]:
    """The plan's reasons, one short sentence each."""
    residency, fast = best.residency, request.budget.compute_tier
    assert residency is not None
    if best.spread:
        return _spread_reasons(best.spread)
    lines = [f"the peak is in `{best.footprint.peak_phase}`"]
    if not residency.streamed:
        return (f"all {len(residency.homes)} blocks stay on {fast}", *lines)
    homes = Counter(residency.homes[position] for position in residency.streamed)
    where = " and ".join(f"{count} from {tier}" for tier, count in sorted(homes.items(), reverse=True))
    stays = len(residency.homes) - len(residency.streamed)
    bound = "the transfer sets the pace" if best.pace.transfer >= best.pace.compute else "the transfer hides behind compute"
    return (
        f"{stays} of {len(residency.homes)} blocks stay on {fast}; {where} stream through {residency.slots} slots",
        f"a pass moves its blocks in {show_seconds(best.pace.seconds['stream'])}: {bound}",
        *lines,
    )


def _spread_reasons(spread: Spread) -> tuple[str, ...]:
    counts = Counter(spread.devices)
    where = ", ".join(f"{counts[number]} on gpu {number}" for number in range(len(spread.predicted)))
    alone = "one GPU alone has no room" if spread.alone is None else f"one GPU alone would take {spread.alone:.1f}x the time"
    return (
        f"all {len(spread.devices)} blocks stay on {len(spread.predicted)} GPUs ({where}); {alone}",
        f"hidden states change the GPU {spread.changes} times in a pass",
        f"the peak of the fullest GPU is in `{max(spread.phases, key=lambda name: total(spread.phases[name]))}`",
    )


def refusal(request: Request, outcomes: list[Outcome]) -> DoesNotFit:
    """The error for a budget in which nothing fits, with the nearest candidate's bytes by kind and what would help."""
    mine = [outcome for outcome in outcomes if allowed(outcome.candidate, request.quality, request.asked)] or outcomes
    nearest = min(mine, key=lambda outcome: _missing_bytes(request, outcome))
    tier = lacking(request, nearest)[0]
    need, have = total(nearest.needed[tier]), request.budget.bytes_of(tier)
    with_what = " + ".join(f"`{name}`" for name in nearest.candidate.names)
    doing = {"generate": "to write text", "tune": "to be tuned", "embed": "for one pass"}[request.workload.task]
    parts = nearest.needed[tier]
    return DoesNotFit(
        f"`{request.skeleton.name}` needs {show_bytes(need)} on {tier} {doing}{f' with {with_what}' if with_what else ''}; "
        f"the budget is {show_bytes(have)}",
        hint=_helps(request, outcomes),
        details="  " + "   ".join(f"{kind} {show_bytes(parts[kind])}" for kind in KINDS if parts.get(kind)),
    )


def lacking(request: Request, outcome: Outcome) -> list[str]:
    """The tiers whose budget is too small for `outcome`, the compute tier first."""
    fast = request.budget.compute_tier
    tiers = dict.fromkeys((fast, "ram", "disk"))
    return [tier for tier in tiers if total(outcome.needed.get(tier, {})) > request.budget.bytes_of(tier)] or [fast]


def _missing_bytes(request: Request, outcome: Outcome) -> int:
    return sum(total(outcome.needed[tier]) - request.budget.bytes_of(tier) for tier in lacking(request, outcome))


def _helps(request: Request, outcomes: list[Outcome]) -> str:
    """What would help, so that whoever types it gets a plan: another quality that fits, or how much of every tier the nearest way takes."""
    fast = request.budget.compute_tier
    fitting = [outcome for outcome in outcomes if outcome.residency is not None]
    if fitting:
        best = min(fitting, key=lambda outcome: outcome.pace.whole)
        names, size = " + ".join(best.candidate.names), show_bytes(total(best.predicted[fast]))
        return f"`--quality {best.candidate.quality}` lets `{names}` fit in {size}"
    nearest = min(outcomes, key=lambda outcome: _missing_bytes(request, outcome))
    tiers = lacking(request, nearest)
    # On the command line a budget for RAM alone asks for a run without the GPU.
    named = tiers if fast == "ram" or "gpu" in tiers else ["gpu", *tiers]
    sizes = {tier: total(nearest.needed[tier]) for tier in named}
    budgets = " ".join(f"--{tier} {enough(size + size // 1000)}" for tier, size in sizes.items())  # since shares of bytes are rounded
    quality = "" if allowed(nearest.candidate, request.quality, request.asked) else f" with `--quality {nearest.candidate.quality}`"
    variable = sum(nearest.needed[tiers[0]].get(kind, 0) for kind in ("activations", "kv_cache"))
    if variable > sizes[tiers[0]] // 3:
        smaller = "`--context`" if nearest.workload.micro_batch == 1 else "`--context` or `--batch`"
        return f"most of it grows with the tokens: try a smaller {smaller}, or `{budgets}`{quality}"
    return f"`{budgets}`{quality} is {'the least that works' if len(tiers) == 1 else 'enough'}"
