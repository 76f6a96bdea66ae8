"""Evaluate: how well a built model predicts a text, as perplexity over windows, each of which begins with the last one's last token."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tightfit.describe.lengths import check_lengths
from tightfit.runtime.build import Built
from tightfit.runtime.observe import Observer
from tightfit.terms.errors import TightfitError
from tightfit.terms.report import Report
from tightfit.terms.units import MIB

LOSS_BYTES = 8 * MIB
"""Most bytes of float32 copies of the logits at one time, beside what the plan foresees."""


@dataclass(frozen=True)
class Score:
    """Perplexity per token, and bits per byte of text, which compares models with unlike vocabularies."""

    perplexity: float
    bits_per_byte: float
    tokens: int
    report: Report


def read_text(file: str | Path) -> str:
    """The text of a file. Raises `TightfitError` for a missing, empty or undecodable one."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise TightfitError(f"cannot read `{file}`: {error.strerror}", hint="name a text file that is there and yours to read") from error
    except UnicodeDecodeError as error:
        raise TightfitError(
            f"`{file}` is not UTF-8: byte {error.start} cannot be read", hint="convert it, for example with `iconv -t utf-8`"
        ) from error
    if not text.strip():
        raise TightfitError(f"`{file}` holds no text", hint="name a file with some sentences")
    return text


def check_scorable(config: Any, tokens: int, window: int) -> None:
    """Refuse what perplexity does not exist for, before a weight is read: a text of `tokens` tokens in windows of `window`.

    Raises `TightfitError` for a model that does not predict a text from left to right, windows beyond its positions, and a single token.
    """
    if config.is_encoder_decoder:
        raise TightfitError(
            f"perplexity needs a decoder-only (causal) model, and `{config.model_type}` is an encoder–decoder",
            hint="name a model such as Llama, Qwen or GPT-2",
        )
    if tokens < 2:
        raise TightfitError("the text is a single token, and there is nothing to predict", hint="name a longer text: some thousand words")
    check_lengths(config, min(window, tokens - 1))


def perplexity(built: Built, ids: Tensor, text_bytes: int, window: int, progress: Callable[[int, int], None]) -> Score:
    """The mean negative log likelihood of `ids` under the model, which reads `window` tokens at a time.  # ids: (1, tokens)

    Every token but the very first is scored once, given those of its window before it: at least the last token of the window before
    (as lm-evaluation-harness's `loglikelihood_rolling` does). Raises as `check_scorable`, and when the loss is not finite.
    """
    check_scorable(built.model.config, ids.shape[1], window)
    nll, scored = 0.0, ids.shape[1] - 1
    with torch.inference_mode(), Observer(built) as observer:
        for start in range(0, scored, window):
            stop = min(start + window, scored)
            nll += _window_loss(built, ids[:, start:stop].to(built.device), ids[0, start + 1 : stop + 1].to(built.device))
            progress(stop, scored)
    if not math.isfinite(nll):
        raise TightfitError("the loss is not finite", hint="the weights are damaged, or overflow in this precision")
    return Score(math.exp(nll / scored), nll / math.log(2) / text_bytes, scored, observer.report(tokens=scored))


def _window_loss(built: Built, part: Tensor, targets: Tensor) -> float:
    """Summed over the window. A function, so that its logits are gone before the next ones come.  # part: (1, n), targets: (n,)"""
    return _summed_loss(built.model(input_ids=part, use_cache=False).logits[0], targets)


def _summed_loss(logits: Tensor, targets: Tensor) -> float:
    """Cross-entropy in float32, a few rows at a time: each row is copied, and copied again inside.  # logits: (tokens, vocab)"""
    rows = max(1, LOSS_BYTES // (2 * 4 * logits.shape[1]))
    parts = (
        torch.nn.functional.cross_entropy(logits[i : i + rows].float(), targets[i : i + rows], reduction="sum")
        for i in range(0, len(targets), rows)
    )
    return sum(part.item() for part in parts)
