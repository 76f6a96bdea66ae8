"""qst: tune a narrow network beside a frozen 4-bit base, and say what QLoRA would take for the same work (Quantized Side Tuning).

*Made of*: `nf4` (blocks of 64, scales in 8 bits) for the base, `side` for what learns, AdamW at a constant rate. The defaults are
those of LLaMA-2-7B on Alpaca; the paper's other sizes stand behind each setting.
*Data*: answers to instructions, of which only the answers count, cut at the length at which the paper measured memory.
*What to expect*: less memory than QLoRA, since no gradient goes through the base, and the model itself at the first step. The paper
measured, in all (MMLU at 4 × 384 tokens): LLaMA-2-7B 7.3 GB against 15.6, 13B 12.6 against 25.4, 70B 56.0 against 95.5, with
45.1, 56.8 and 63.9 % right against 45.9, 54.7 and 64.1; up to 2.3 times less at 16 × 512 (OPT-6.7B on GLUE: 27.5 against 63.6 GB). The
report ends in both peaks of this model, of tensors only: `side_peak_bytes` and `qlora_peak_bytes`.
*What differs here*: both are planned, by a rehearsal of one step with as many samples at a time as this run has, where there is room for
all: nothing streamed or recomputed. QLoRA is `lora` of rank 64 with a dropout of 0.1 on every linear layer. Both have the loss of
`chunked_loss`, so the logits, which would weigh the same in both, are in neither. Gates and mix are the paper's scalars, see `side`.
Gradients are clipped at 0.3, as in the released script for 70B; the paper names no clipping for the others.
*Paper*: Zhang et al. 2024, Quantized Side Tuning: Fast and Memory-Efficient Tuning of Quantized Large Language Models (ACL), section 3,
table 9.
"""

from dataclasses import replace
from typing import Literal

from tightfit.recipes import SILENT, Told, budget_of_run
from tightfit.terms.plan import Plan
from tightfit.terms.report import Report
from tightfit.terms.tuning import Tuning
from tightfit.terms.units import show_bytes

BASE = "nf4:layout=standard"
QLORA = "lora:rank=64,alpha=16,dropout=0.1"
"""The adapter that the paper compares with: QLoRA's own settings up to 13B."""


def run(
    model: str,  # a folder, a preset, or a Hugging Face id
    data: str,  # JSONL (messages, instruction, text), a datasets folder, or a text
    output: str,  # the folder that takes the side network
    *,
    held_out: str | None = None,  # data to measure the loss on, before and after
    batch: int = 4,  # samples for one update; the paper's: 8 up to 2.7B, 2 for 13B, 1 beyond
    context: int = 384,  # tokens at which samples are cut
    epochs: float = 3.0,  # times through the data; the paper's: 5 up to 2.7B, 2 or 3 for 13B, 2 beyond
    steps: int = 0,  # updates, in place of epochs
    learning_rate: float = 2e-4,  # the paper's: 1e-4 for OPT-13B and all beyond 13B
    clip: float = 0.3,  # largest gradient norm; 0: any
    reduction: int = 16,  # the side's width is the model's over this; memory falls until 16, and little after
    downsample: Literal["adapter", "lora", "linear", "max_pool", "avg_pool"] = "adapter",  # pools keep least, and fit a little worse
    rank: int = 16,  # of the downsamplers `adapter` and `lora`
    mixed_precision: Literal["no", "bf16"] = "bf16",  # what is computed in
    gpu: str | None = None,  # a size such as 6GiB
    ram: str | None = None,  # a size such as 6GiB
    disk: str | None = None,  # a size such as 6GiB
    save_every: int = 0,  # steps between checkpoints; 0: each epoch
    resume: bool = False,  # go on with the run in the folder
    seed: int = 0,  # of the first values and the order of the samples
    told: Told = SILENT,
) -> Report:
    """Tune a side network beside a 4-bit base inside the budget; `scores` hold its planned peak and QLoRA's for the same work."""
    from tightfit.verbs.tuning import plan_tuning, read_lesson, tune

    tuning = Tuning(epochs, steps, learning_rate, "constant", clip=clip, seed=seed, save_every=save_every)
    side = f"side:reduction={reduction},downsample={downsample},rank={rank}"
    lesson = read_lesson(model, data, context, tuning, held_out, told.reading)
    budget = budget_of_run(output, resume, gpu, ram, disk)
    planned = plan_tuning(model, lesson, batch, budget, techniques=(BASE, side), precision=mixed_precision)
    told.planned(planned)
    report = tune(planned, lesson, output, tuning, resume, progress=told.loading, watch=told.learning)
    peaks = {"side_peak_bytes": planned_peak(planned, side), "qlora_peak_bytes": planned_peak(planned, QLORA)}
    told.finding(
        f"the tensors of a step peak at {show_bytes(peaks['side_peak_bytes'])}, QLoRA's at {show_bytes(peaks['qlora_peak_bytes'])}: "
        f"{peaks['qlora_peak_bytes'] / peaks['side_peak_bytes']:.2f} times as much (both planned, nothing streamed or recomputed)"
    )
    return replace(report, scores={**report.scores, **peaks})


def planned_peak(planned: Plan, adapter: str) -> int:
    """Bytes of tensors at the peak of a step like `planned`'s with `adapter` on the same base: a rehearsal where there is room for all."""
    from tightfit.describe.source import describe
    from tightfit.formats.codec import as_if_on
    from tightfit.rehearse.rehearsal import rehearse
    from tightfit.runtime.adapters import made
    from tightfit.verbs import settings_of
    from tightfit.verbs.tuning import computed_in

    same = {name: planned.techniques[name] for name in ("nf4", "chunked_loss") if name in planned.techniques}
    techniques = same | settings_of([adapter])
    skeleton = computed_in(describe(planned.model, "tune", fetch=False), planned.workload.precision, techniques)
    with as_if_on("cuda" if planned.compute_tier == "gpu" else "cpu"):
        return rehearse(skeleton.meta_model, planned.workload, made(techniques).values()).peak_bytes
