"""Explain: why a plan was taken, and what a refusal should say. Words only; the figures come from the outcomes."""

from collections import Counter

from tightfit.planner.candidates import allowed
from tightfit.planner.outcome import Outcome, Request
from tightfit.terms.errors import DoesNotFit
from tightfit.terms.footprint import KINDS, total
from tightfit.terms.units import enough, show_bytes, show_seconds


def reasons(request: Request, best: Outcome) -> tuple[str, ...]:
    """The plan's reasons, one short sentence each."""
    residency, fast = best.residency, request.budget.compute_tier
    assert residency is not None
    lines = [f"the peak is in `{best.footprint.peak_phase}`"]
    if not residency.streamed:
        return (f"all {len(residency.homes)} blocks stay on {fast}", *lines)
    homes = Counter(residency.homes[position] for position in residency.streamed)
    where = " and ".join(f"{count} from {tier}" for tier, count in sorted(homes.items(), reverse=True))
    stays = len(residency.homes) - len(residency.streamed)
    stream, token = best.pace.seconds["stream"], best.pace.seconds.get("token", best.pace.seconds.get("step", 0.0))
    bound = "the transfer sets the pace" if stream >= token else "the transfer hides behind compute"
    return (
        f"{stays} of {len(residency.homes)} blocks stay on {fast}; {where} stream through {residency.slots} slots",
        f"a pass moves its blocks in {show_seconds(stream)}: {bound}",
        *lines,
    )


def refusal(request: Request, outcomes: list[Outcome]) -> DoesNotFit:
    """The error for a budget in which nothing fits, with the nearest candidate's bytes by kind and what would help."""
    fast, asked = request.budget.compute_tier, request.asked
    mine = [outcome for outcome in outcomes if allowed(outcome.candidate, request.quality, asked)] or outcomes
    nearest = min(mine, key=lambda outcome: total(outcome.needed[fast]))
    tier = lacking(request, nearest)
    need, have = total(nearest.needed[tier]), request.budget.bytes_of(tier)
    with_what = " + ".join(f"`{name}`" for name in nearest.candidate.names)
    doing = {"generate": "to write text", "tune": "to be tuned", "embed": "for one pass"}[request.workload.task]
    parts = nearest.needed[tier]
    return DoesNotFit(
        f"`{request.skeleton.name}` needs {show_bytes(need)} on {tier} {doing}{f' with {with_what}' if with_what else ''}; "
        f"the budget is {show_bytes(have)}",
        hint=_helps(request, outcomes, nearest, tier),
        details="  " + "   ".join(f"{kind} {show_bytes(parts[kind])}" for kind in KINDS if parts.get(kind)),
    )


def lacking(request: Request, outcome: Outcome) -> str:
    """The tier whose budget is too small for `outcome`; the compute tier where several are."""
    fast = request.budget.compute_tier
    over = [tier for tier in (fast, "ram", "disk") if total(outcome.needed.get(tier, {})) > request.budget.bytes_of(tier)]
    return over[0] if over else fast


def _helps(request: Request, outcomes: list[Outcome], nearest: Outcome, tier: str) -> str:
    """What would help: another quality that fits, fewer tokens, or how much budget the smallest way takes."""
    fast = request.budget.compute_tier
    fitting = [outcome for outcome in outcomes if outcome.residency is not None]
    if fitting:
        best = min(fitting, key=lambda outcome: outcome.pace.whole)
        names, size = " + ".join(best.candidate.names), show_bytes(total(best.predicted[fast]))
        return f"`--quality {best.candidate.quality}` lets `{names}` fit in {size}"
    smallest = min(outcomes, key=lambda outcome: total(outcome.needed[fast])) if tier == fast else nearest
    least = total(smallest.needed[tier])
    quality = "" if allowed(smallest.candidate, request.quality, request.asked) else f" with `--quality {smallest.candidate.quality}`"
    asked = f"`--{tier} {enough(least + least // 1000)}`{quality}"  # a thousandth more, since shares of bytes are rounded
    variable = sum(smallest.needed[tier].get(kind, 0) for kind in ("activations", "kv_cache"))
    if variable > least // 3:
        return f"most of it grows with the tokens: try a smaller `--context` or `--batch`, or {asked}"
    return f"{asked} is the least that works"
