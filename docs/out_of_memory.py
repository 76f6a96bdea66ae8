"""Out of memory: what each remedy leaves of a tuning step, by rehearsal: `python docs/out_of_memory.py [MODEL] [BATCH] [CONTEXT]`.

Nothing is loaded and nothing is run; the seconds are those of a guessed machine, so only their ratio is shown.
"""

import sys
from dataclasses import replace

import tightfit
from tightfit import Budget, Plan, Workload
from tightfit.describe.source import describe
from tightfit.runtime.process import keep_quiet

ROOM = Budget.parse(ram="4TiB", disk="4TiB")
FREE = ("lora", "chunked_loss")
LADDER = (
    ("the whole model, AdamW", (), 1, 1),
    ("1  lora", ("lora",), 1, 1),
    ("2  chunked_loss", FREE, 1, 1),
    ("3  one row at a time", FREE, 4, 1),
    ("4  recompute, all rows", (*FREE, "recompute"), 1, 1),
    ("   recompute, one row", (*FREE, "recompute"), 4, 1),
    ("5  nf4", (*FREE, "recompute", "nf4"), 4, 1),
    ("6  side in place of lora", ("side:downsample=avg_pool", "chunked_loss", "nf4"), 4, 1),
    ("7  half the context", (*FREE, "recompute", "nf4"), 4, 2),
)
"""What it is called, the techniques, into how many parts the batch is split, and by what the context is divided."""


def main(model: str = "llama-2-7b", batch: str = "4", context: str = "512") -> None:
    """Print a line for each remedy: bytes by kind and all together, and how long a step takes beside LoRA's."""
    keep_quiet()
    skeleton, asked = describe(model, "tune"), Workload("tune", int(batch), int(context))
    print(f"{model}, {batch} × {context} tokens, GiB of RAM")
    print(f"{'':<26}{'weights':>9}{'learning':>10}{'activations':>13}{'overhead':>10}{'all':>8}{'time':>7}")
    plain = 0.0
    for name, techniques, parts, shorter in LADDER:
        work = replace(asked, micro_batch=max(1, asked.batch // parts), tokens=asked.tokens // shorter)
        planned = tightfit.plan(skeleton, work, ROOM, "exact", techniques)
        plain = planned.seconds["step"] if techniques == ("lora",) else plain
        print(f"{name:<26}{_sizes(planned)}{_ratio(planned.seconds['step'], plain)}")


def _sizes(planned: Plan) -> str:
    kinds = planned.predicted["ram"]
    learning = kinds.get("gradients", 0) + kinds.get("optimizer", 0)
    columns = (kinds["weights"], learning, kinds["activations"], kinds["overhead"])
    shown = "".join(f"{size / 2**30:>{width}.2f}" for size, width in zip(columns, (9, 10, 13, 10), strict=True))
    return f"{shown}{planned.predicted_bytes('ram') / 2**30:>8.2f}"


def _ratio(seconds: float, plain: float) -> str:
    return f"{seconds / plain:>6.2f}x" if plain else ""


if __name__ == "__main__":
    main(*sys.argv[1:])
