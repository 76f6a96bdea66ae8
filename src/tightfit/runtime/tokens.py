"""Tokens: text to token ids and back, with the model's own tokenizer and chat template."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tightfit.describe.lengths import check_lengths
from tightfit.describe.skeleton import Skeleton
from tightfit.terms.errors import TightfitError


@dataclass(frozen=True)
class Prompt:
    """What goes into the model.  # input_ids: (1, tokens)"""

    input_ids: Tensor
    tokenizer: Any = None

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.input_ids.shape[1]


def load_tokenizer(skeleton: Skeleton) -> Any:
    """The tokenizer in the model's folder; None for a preset, which has none."""
    from transformers import AutoTokenizer

    if not skeleton.folder:
        return None
    try:
        return AutoTokenizer.from_pretrained(skeleton.folder)
    except Exception as error:  # tokenizers fail in their own many ways
        if not _has_tokenizer_files(skeleton.folder):
            return None
        raise TightfitError(f"the tokenizer in `{skeleton.folder}` cannot be read: {(str(error).splitlines() or [''])[0]}") from error


def encode(skeleton: Skeleton, text: str, chat: bool = False, new_tokens: int = 0) -> Prompt:
    """The prompt as token ids. Without a tokenizer (a preset with random weights) each word becomes one arbitrary id.

    Raises `TightfitError` for an empty prompt, a chat without a template, and a prompt that leaves no room for `new_tokens`;
    a negative number of them lets a text of any length pass, which is then read window by window.
    """
    if not text:
        raise TightfitError("the prompt is empty", hint='give some text: `--prompt "Once upon a time"`')
    tokenizer = load_tokenizer(skeleton)
    config = skeleton.config.get_text_config(decoder=True)
    if tokenizer is None:
        ids = torch.tensor([[1 + hash_of(word) % (config.vocab_size - 1) for word in text.split()]], dtype=torch.long)
    elif chat:
        if not tokenizer.chat_template:
            raise TightfitError(
                f"`{skeleton.name}` has no chat template", hint="it is a base model: leave out `--chat` and let it continue a text"
            )
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    else:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if ids.shape[1] == 0:
        raise TightfitError("the prompt has no token", hint='give some text: `--prompt "Once upon a time"`')
    if new_tokens >= 0:
        check_lengths(skeleton.config, ids.shape[1], new_tokens)
    return Prompt(ids, tokenizer)


def hash_of(word: str) -> int:
    """A number that is the same in every process."""
    return int.from_bytes(word.encode()[:8].ljust(8, b"\0"), "little")


def _has_tokenizer_files(folder: str) -> bool:
    from pathlib import Path

    return any(
        (Path(folder) / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
    )
