"""Evaluate: how well a built model predicts a text, as perplexity over windows that share a stride of context."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tightfit.runtime.build import Built
from tightfit.runtime.observe import Observer
from tightfit.terms.errors import TightfitError
from tightfit.terms.report import Report


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
        raise TightfitError(f"cannot read `{file}`: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TightfitError(
            f"`{file}` is not UTF-8: byte {error.start} cannot be read", hint="convert it, for example with `iconv -t utf-8`"
        ) from error
    if not text.strip():
        raise TightfitError(f"`{file}` holds no text")
    return text


def perplexity(built: Built, ids: Tensor, text_bytes: int, window: int, progress: Callable[[int, int], None]) -> Score:
    """The mean negative log likelihood of `ids` under the model, in windows of `window` tokens without overlap.  # ids: (1, tokens)

    The first token of a window is not scored, since nothing stands before it.
    """
    if ids.shape[1] < 2:
        raise TightfitError("the text is a single token, and there is nothing to predict")
    nll, scored = 0.0, 0
    with torch.inference_mode(), Observer(built) as observer:
        for start in range(0, ids.shape[1] - 1, window):
            part = ids[:, start : start + window].to(built.device)
            if part.shape[1] < 2:
                break
            logits = built.model(input_ids=part, use_cache=False).logits[0, :-1]
            nll += _summed_loss(logits, part[0, 1:])
            scored += part.shape[1] - 1
            progress(min(start + window, ids.shape[1]), ids.shape[1])
    if not math.isfinite(nll):
        raise TightfitError("the loss is not finite", hint="the weights are damaged, or overflow in this precision")
    return Score(math.exp(nll / scored), nll / math.log(2) / text_bytes, scored, observer.report(tokens=scored))


def _summed_loss(logits: Tensor, targets: Tensor, rows: int = 256) -> float:
    """Cross-entropy in float32, a few rows at a time.  # logits: (tokens, vocab)"""
    parts = (
        torch.nn.functional.cross_entropy(logits[i : i + rows].float(), targets[i : i + rows], reduction="sum")
        for i in range(0, len(targets), rows)
    )
    return sum(part.item() for part in parts)
