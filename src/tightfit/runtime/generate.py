"""Generate: write text with a built model. The decoding loop is Hugging Face `generate`; ours is what happens inside a pass."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

_PLANNED = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "max_length": None,  # the number of new tokens is what counts
    "use_cache": True,
    "cache_implementation": None,
    "prefill_chunk_size": None,
    "guidance_scale": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "use_mtp": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "return_dict_in_generate": False,
}
"""What a plan foresees, whatever the model's generation config says: one sequence, one pass and one growing cache."""

_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Settings that mean nothing when the likeliest token is taken."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, in `generate`'s words. A temperature of 0 is greedy, also where the model's config samples."""

    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float | None = None  # None: what the model's generation config says, else 1
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
    config = _config(built, sampling)
    with torch.inference_mode(), _generating_by(built.model, config), Observer(built) as observer:
        output = built.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            tokenizer=prompt.tokenizer,  # for stop texts
            streamer=_Pieces(prompt.tokenizer, listen) if listen and prompt.tokenizer is not None else None,
            logits_processor=[_refuse_nan],
        )
    given = 1 if built.model.config.is_encoder_decoder else ids.shape[1]  # a decoder is given its start token
    written = output[0, given:]
    text = (
        prompt.tokenizer.decode(written, skip_special_tokens=True) if prompt.tokenizer is not None else " ".join(map(str, written.tolist()))
    )
    return observer.report(tokens=len(written), text=text)


def _config(built: Built, sampling: Sampling) -> GenerationConfig:
    """The model's own generation config (stop tokens, suppressed tokens, penalties), with what the user asked for on top."""
    config = copy.deepcopy(_own_config(built))
    ends = config.eos_token_id
    padding = ends[0] if isinstance(ends, list) else ends
    chosen: dict[str, Any] = dict.fromkeys(_OF_SAMPLING) | {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    if sampling.repetition_penalty is not None:
        chosen["repetition_penalty"] = sampling.repetition_penalty
    if sampling.stop:
        chosen["stop_strings"] = list(sampling.stop)
    if sampling.ignore_eos:
        chosen["eos_token_id"] = None
    if config.pad_token_id is None:
        chosen["pad_token_id"] = padding if padding is not None else 0
    config.update(max_new_tokens=built.plan.workload.new_tokens, **_PLANNED, **chosen)
    return config


def _own_config(built: Built) -> GenerationConfig:
    """As `from_pretrained` finds it: beside the weights, else among the values of `config.json`, where older models keep it."""
    if not built.skeleton.folder:
        return built.model.generation_config
    folder = Path(built.skeleton.folder)
    name = "generation_config.json" if (folder / "generation_config.json").is_file() else "config.json"
    try:
        return GenerationConfig.from_pretrained(folder, name, **{"_from_model_config": True} if name == "config.json" else {})
    except Exception as error:  # it is checked in many ways
        raise TightfitError(f"`{folder / name}` is damaged", hint="fetch it again, as it lies beside the original weights") from error


@contextmanager
def _generating_by(model: Any, config: GenerationConfig) -> Iterator[None]:
    """`generate` fills what is None in its argument (a stop token left out, say) from the model's own config: so exchange that one."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def _refuse_stops(stop: tuple[str, ...], prompt: Prompt) -> None:
    if "" in stop:
        raise TightfitError("an empty stop text would end every answer at once", hint="leave `--stop` out, or name a text")
    if stop and prompt.tokenizer is None:
        raise TightfitError("a stop text needs the model's tokenizer, which is not in its folder", hint="leave `--stop` out")


def _refuse_nan(_ids: Tensor, scores: Tensor) -> Tensor:
    """Single tokens may be at minus infinity: the model's generation config forbids them."""
    if not torch.isfinite(scores.max()):
        raise TightfitError("the model's output is not finite", hint="the weights are damaged, or overflow in this precision")
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
