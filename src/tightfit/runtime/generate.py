"""Generate: write text with a built model. The decoding loop is Hugging Face `generate`; ours is what happens inside a pass."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from tightfit.runtime.build import Built
from tightfit.runtime.observe import Observer
from tightfit.runtime.tokens import Prompt
from tightfit.terms.errors import TightfitError
from tightfit.terms.report import Report

Listener = Callable[[str], None]
"""Told each new piece of text as soon as it is sure."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, in `generate`'s words. A temperature of 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = field(default=())  # texts that end the generation
    ignore_eos: bool = False  # write all planned tokens, for measuring


def generate(built: Built, prompt: Prompt, sampling: Sampling | None = None, listen: Listener | None = None) -> Report:
    """Write up to the planned number of tokens after `prompt`; the report holds the text.

    Raises `TightfitError` when the model's logits are not finite, and when the process goes over its budget.
    """
    sampling = sampling or Sampling()
    _refuse_stops(sampling.stop, prompt)
    torch.manual_seed(sampling.seed)
    ids = prompt.input_ids.to(built.device)
    streamer = _Pieces(prompt.tokenizer, listen) if listen and prompt.tokenizer is not None else None
    stopping = {"stop_strings": list(sampling.stop), "tokenizer": prompt.tokenizer} if sampling.stop else {}
    with torch.inference_mode(), Observer(built) as observer:
        output = built.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=_config(built, sampling),
            streamer=streamer,
            logits_processor=[_refuse_nan],
            **stopping,
        )
    start = 0 if built.model.config.is_encoder_decoder else ids.shape[1]
    written = output[0, start:]
    text = (
        prompt.tokenizer.decode(written, skip_special_tokens=True) if prompt.tokenizer is not None else " ".join(map(str, written.tolist()))
    )
    return observer.report(tokens=len(written), text=text)


def _config(built: Built, sampling: Sampling) -> GenerationConfig:
    """The model's own generation config (stop tokens, padding), with what the user asked for on top."""
    own = _own_config(built)
    chosen: dict[str, Any] = {"do_sample": sampling.temperature > 0, "repetition_penalty": sampling.repetition_penalty}
    if sampling.temperature > 0:
        chosen |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    tokens = built.plan.workload.new_tokens
    ends = own.eos_token_id
    padding = own.pad_token_id if own.pad_token_id is not None else (ends[0] if isinstance(ends, list) else ends)
    return GenerationConfig(
        max_new_tokens=tokens,
        eos_token_id=None if sampling.ignore_eos else ends,
        bos_token_id=own.bos_token_id,
        pad_token_id=padding if padding is not None else 0,
        decoder_start_token_id=own.decoder_start_token_id,
        **chosen,
    )


def _own_config(built: Built) -> GenerationConfig:
    """What lies beside the weights, since its stop tokens may be more than those of the model's config."""
    if not (Path(built.skeleton.folder) / "generation_config.json").is_file() or not built.skeleton.folder:
        return built.model.generation_config
    try:
        return GenerationConfig.from_pretrained(built.skeleton.folder)
    except Exception as error:  # it is checked in many ways
        raise TightfitError(f"`{built.skeleton.folder}/generation_config.json` is damaged", hint="fetch it again, or remove it") from error


def _refuse_stops(stop: tuple[str, ...], prompt: Prompt) -> None:
    if "" in stop:
        raise TightfitError("an empty stop text would end every answer at once", hint="leave `--stop` out, or name a text")
    if stop and prompt.tokenizer is None:
        raise TightfitError("a stop text needs the model's tokenizer, which is not in its folder", hint="leave `--stop` out")


def _refuse_nan(_ids: Tensor, scores: Tensor) -> Tensor:
    if not torch.isfinite(scores.sum()):
        raise TightfitError(
            "the model's output is not finite", hint="the weights are damaged, or overflow in this precision; nothing was written"
        )
    return scores


class _Pieces(BaseStreamer):
    """Tells text as it becomes sure: a piece is held back while its last character may still change."""

    def __init__(self, tokenizer: Any, listen: Listener) -> None:
        self.tokenizer, self.listen = tokenizer, listen
        self.ids: list[int] = []
        self.told = ""
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        """The prompt first, then each token."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("�"):
            self._tell(text)

    def end(self) -> None:
        """Tell what was held back."""
        self._tell(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _tell(self, text: str) -> None:
        self.listen(text[len(self.told) :])
        self.told = text
