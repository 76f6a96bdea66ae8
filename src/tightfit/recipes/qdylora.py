"""qdylora: tune one adapter on a frozen 4-bit base that serves every rank, and measure each rank (Quantized Dynamic LoRA).

*Made of*: `nf4` (scales in 8 bits too) for the base, `dylora` on every linear layer for what learns, AdamW at a constant rate; then the
held-out loss of the one adapter cut to 1, 2, 4 … rows, up to all of them.
*Data*: answers to instructions, of which only the answers count, and others like them that are held out.
*What to expect*: one run in place of one for each rank, a table `held_out_loss_rank_1` … in the report, and `best_rank`. The best rank
is often far below the largest: the paper names 2 for Web-GLM and 8 for GSM8k (Falcon-40B), and claims QLoRA's quality or better at the
best rank on MMLU. Falcon-40B with ranks 1 to 64 fits one GPU of 32 GB (abstract). Losses fall with the rank only roughly, and a short run
favours low ranks, which take part in more steps.
*What differs here*: the paper's table of settings was not to be had; it tells of the same budget and largest rank as QLoRA, so the defaults
are those of QLoRA's released script for 7B on OASST1, with its 16 + 512 tokens as one length. That script names a warm-up and a
`constant` schedule, for which transformers leaves the warm-up out; here it takes place. The optimizer is not paged. The paper leaves open
whether all rows that take part learn or only the last; here all, unless `frozen` is asked for.
*Paper*: Rajabzadeh et al. 2024, QDyLoRA: Quantized Dynamic Low-Rank Adaptation (EMNLP industry), algorithm 1; Dettmers et
al. 2023, QLoRA.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tightfit.recipes import SILENT, Told, budget_of_run
from tightfit.terms.plan import Plan
from tightfit.terms.report import Report
from tightfit.terms.tuning import Tuning

BASE = "nf4:layout=standard"


def run(
    model: str,  # a folder, a preset, or a Hugging Face id
    data: str,  # JSONL (messages, instruction, text), a datasets folder, or a text
    output: str,  # the folder that takes the adapter
    *,
    held_out: str,  # data to measure each rank on, which the run never learns from
    batch: int = 16,  # samples for one update
    context: int = 528,  # tokens at which samples are cut
    steps: int = 1875,  # updates
    learning_rate: float = 2e-4,  # QLoRA's beyond 13B: 1e-4
    warmup: float = 0.03,  # share of the steps
    clip: float = 0.3,  # largest gradient norm; 0: any
    rank: int = 64,  # the largest
    alpha: float = 16.0,  # the update is scaled by alpha over the rank in use
    dropout: float = 0.1,  # of the adapters' inputs; QLoRA's beyond 13B: 0.05
    mode: Literal["full", "frozen"] = "full",  # of the rows that take part in a step all learn, or the last
    mixed_precision: Literal["no", "bf16"] = "bf16",  # what is computed in
    export: bool = False,  # write each measured rank as a plain PEFT LoRA too, to `rank-1` … in the folder
    gpu: str | None = None,  # a size such as 6GiB
    ram: str | None = None,  # a size such as 6GiB
    disk: str | None = None,  # a size such as 6GiB
    save_every: int = 0,  # steps between checkpoints; 0: each epoch
    resume: bool = False,  # go on with the run in the folder
    seed: int = 0,  # of the first values, the ranks drawn, and the order of the samples
    told: Told = SILENT,
) -> Report:
    """Tune one adapter for all ranks on a 4-bit base inside the budget; `scores` hold the held-out loss of each rank measured."""
    from tightfit.runtime.export import export_peft
    from tightfit.verbs.tuning import plan_tuning, read_lesson, tune

    tuning = Tuning(
        steps=steps,
        learning_rate=learning_rate,
        schedule="constant_with_warmup",
        warmup=warmup,
        clip=clip,
        seed=seed,
        save_every=save_every,
    )
    nested = f"dylora:rank={rank},alpha={alpha},dropout={dropout},mode={mode},seed={seed}"
    lesson = read_lesson(model, data, context, tuning, held_out, told.reading)
    budget = budget_of_run(output, resume, gpu, ram, disk)
    planned = plan_tuning(model, lesson, batch, budget, techniques=(BASE, nested), precision=mixed_precision)
    told.planned(planned)
    report = tune(planned, lesson, output, tuning, resume, progress=told.loading, watch=told.learning)
    losses = {}
    for cut, loss in held_out_losses(planned, lesson, output, ranks_to(rank)):
        losses[cut] = loss
        told.finding(f"rank {cut}: held-out loss {loss:.4f}")
        if export:
            export_peft(output, Path(output) / f"rank-{cut}", cut)
    table = {f"held_out_loss_rank_{cut}": loss for cut, loss in losses.items()}
    return replace(report, scores={**report.scores, **table, "best_rank": float(min(losses, key=lambda cut: losses[cut]))})


def ranks_to(largest: int) -> list[int]:
    """1, 2, 4 … and the largest."""
    return [*(1 << power for power in range((largest - 1).bit_length())), largest]


def held_out_losses(planned: Plan, lesson: Any, folder: str, ranks: list[int]) -> Iterator[tuple[int, float]]:
    """Each of `ranks` with the mean held-out loss of the adapter in `folder` cut to it, on the base as it was planned."""
    from tightfit.describe.source import describe
    from tightfit.runtime.adapters import load_adapter, read_adapter
    from tightfit.runtime.build import build
    from tightfit.runtime.process import return_freed_memory
    from tightfit.runtime.tune import summed_loss
    from tightfit.techniques.dylora import set_rank
    from tightfit.verbs.tuning import computed_in

    return_freed_memory()  # of the model that was tuned: two would not fit
    skeleton = computed_in(describe(planned.model, "tune", fetch=False), planned.workload.precision, planned.techniques)
    with build(planned, skeleton) as built:
        load_adapter(built, read_adapter(folder))
        built.model.eval()
        for rank in ranks:
            set_rank(built.model, rank)
            summed, counted = summed_loss(built, lesson.held_out, range(len(lesson.held_out)))
            yield rank, summed / counted
