"""leanquant: bring a model to few bits on values that are learned for each row, and score it beside the dense one (LeanQuant).

*Made of*: `lean`, which learns a row's values by k-means, each weight counted by what an error there costs, and makes errors good by later
columns, those with the largest inputs first; then the perplexity of the dense model and of what was written, on a text that was not read.
*Data*: a text like what the model will read; the paper's is 128 sequences of 2,048 tokens from C4. And one that is held out; the paper's
are WikiText2 and C4, in windows as long.
*What to expect*: `perplexity_before` and `perplexity` with their ratio in the report, near 1 at 4 bits, and rising fast below 3. The
paper's Llama-2-7B reaches 15.51 on WikiText2 at 2.01 bits (table 7, as a re-implementation quotes it); Llama-3.1-405B
took 21 hours on two GPUs of 48 GB (abstract), a 70B four hours on one of 24 GB (the released code's page).
*What differs here*: sequences are taken evenly from your text, not at random. The importance is the released code's, `U_jj^(-power)`
with the inverse Hessian's upper factor U; the text has the whole inverse's diagonal. k-means begins where dynamic programming over a few
bins ends, not evenly (2 and 3 bits) or by k-means++ (4). The search for affine ranges, which was not released, goes from coarse to fine,
some 120 candidates in place of a million. Codes are packed to their bits at every width. A window begins with the last one's last token, so
that no token goes unscored. `tightfit quantize` adds what the paper does not have: a choice of tables for each row (`spread`), an aim
at the dense model's output (`aim`), and turns between values and codes (`rounds`). It is the better for it.
*Paper*: Zhang and Shrivastava 2025, LeanQuant: Accurate and Scalable Large Language Model Quantization with Loss-error-aware Grid
(ICLR), sections 4 and 5; damping, column order and true-sequential as its released code recommends.
"""

from dataclasses import replace
from typing import Literal

from tightfit.recipes import SILENT, Told
from tightfit.terms.budget import Budget
from tightfit.terms.plan import Plan
from tightfit.terms.quantizing import QuantizeReport


def run(
    model: str,  # a folder, a preset, or a Hugging Face id
    data: str,  # a text file that shows what the layers are fed
    output: str,  # the folder that takes the model in few bits
    *,
    held_out: str,  # a text file to measure perplexity on, which the run never reads otherwise
    bits: int = 4,  # 4, 3 or 2 a weight, as in the paper; or 8
    grid: Literal["table", "affine"] = "table",  # any values, the paper's `nu`; or affine: evenly spaced ones, which can be exported
    group: int = 0,  # columns that share a scale, for `affine` only; 0 for a whole row; the paper's: 128
    power: float = 4.0,  # p of the importance; 3 and 4 are recommended and fit alike
    rounds: int = 0,  # turns between values and codes after the paper's walk; `tightfit quantize` takes 4
    damping: float = 0.1,  # share of the mean diagonal that is added to the Hessian; or 0.01
    samples: int = 128,  # sequences of the text at most; the paper's for 405B: 64
    context: int = 2048,  # tokens of a sequence, and of a window that is scored
    gpu: str | None = None,  # a size such as 6GiB
    ram: str | None = None,  # a size such as 6GiB
    disk: str | None = None,  # a size such as 6GiB
    resume: bool = False,  # go on with a run that was stopped
    told: Told = SILENT,
) -> QuantizeReport:
    """Write `model` in few bits inside the budget; `scores` hold the held-out perplexity of both, their ratio, and bits a weight."""
    from tightfit.verbs import check_text, plan_text
    from tightfit.verbs.quantizing import plan_quantize, quantize, read_calibration

    budget = Budget.parse(gpu, ram, disk)
    settings = {"bits": bits, "grid": grid, "group": group, "power": power, "rounds": rounds, "damping": damping}
    settings |= {"spread": False, "aim": 0.0}  # neither is in the paper
    calibration = read_calibration(model, data, context, samples)
    planned = plan_quantize(model, calibration, "lean", settings, budget)
    dense = plan_text(model, context, budget)
    check_text(dense, held_out)
    told.planned(planned)
    report = quantize(planned, calibration, output, resume, told.solving)
    before = perplexity_of(dense, held_out, told, 0)
    after = perplexity_of(plan_text(output, context, budget), held_out, told, 1)
    told.finding(
        f"perplexity {before:.3f} → {after:.3f}: {after / before:.3f} times as high at {planned.bits_per_weight:.2f} bits a weight"
    )
    scores = {"perplexity_before": before, "perplexity": after, "perplexity_ratio": after / before}
    return replace(report, scores={**scores, "bits_per_weight": planned.bits_per_weight})


def perplexity_of(planned: Plan, held_out: str, told: Told, turn: int) -> float:
    """Of the first (`turn` 0) or second of two models, which share the progress that is told."""
    from tightfit.runtime.process import return_freed_memory
    from tightfit.verbs import evaluate

    return_freed_memory()  # of the model before: two would not fit
    score = evaluate(planned, held_out, lambda done, whole: told.scoring(turn * whole + done, 2 * whole))
    for warning in score.report.warnings:
        told.finding(f"warning: scoring `{planned.model}`: {warning}")
    return score.perplexity
