"""Tasks: two small ones from real text, each in three parts that share no document: to learn from, to choose rates on, to be judged by.

- `instruction`: worded sums and their worked answers (GSM8K); the loss counts the answers only. Judged on the data set's own test part.
- `domain`: articles of an encyclopedia (Wikipedia), in windows, each inside one article; the loss counts every token.

Neither model has read either. Whatever has read them, a record is the same for every method.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that is not counted."""

Encode = Callable[[str], list[int]]
Record = tuple[list[int], int]
"""Tokens, and how many of them at the start are not counted."""


@dataclass(frozen=True)
class Task:
    """Records by part: `train`, `validation` (rates are chosen on it) and `held_out`."""

    name: str
    train: list[Record]
    validation: list[Record]
    held_out: list[Record]

    def counted(self, part: str) -> int:
        """Tokens of a part that the loss counts; the first token of a record is never predicted."""
        return sum(len(ids) - max(skipped, 1) for ids, skipped in vars(self)[part])


def read_task(name: str, data: Path, tokenizer: Any, tokens: int, validation: int, held_out: int) -> Task:
    """The task, cut for this tokenizer: `tokens` of a record at most, and so many records of the two parts that nothing learns from."""
    texts = {"instruction": sums, "domain": articles}[name](data)
    cut = {"instruction": answers, "domain": windows}[name]
    counts = {"train": None, "validation": validation, "held_out": held_out}
    return Task(name, **{part: list(islice(cut(texts[part], tokenizer, tokens), count)) for part, count in counts.items()})


def sums(data: Path) -> dict[str, list[tuple[str, str]]]:
    """Questions and answers without their calculator's marks. Every tenth of the training file is for validation."""

    def read(part: str) -> list[tuple[str, str]]:
        rows = [json.loads(line) for line in (data / "corpora" / "gsm8k" / f"{part}.jsonl").read_text().splitlines()]
        return [(f"Question: {row['question'].strip()}\nAnswer:", " " + re.sub("<<.*?>>", "", row["answer"]).strip()) for row in rows]

    learned = read("train")
    others = [row for at, row in enumerate(learned) if at % 10]
    return {"train": others, "validation": learned[::10], "held_out": read("test")}


def articles(data: Path) -> dict[str, list[str]]:
    """Of every ten articles, in the file's order, eight are to learn from, one for validation, one held out."""
    text = (data / "corpora" / "calibration" / "wiki.utf8").read_text()
    found = [body.strip() for body in re.findall(r"<doc [^>]*>\n(.*?)</doc>", text, flags=re.DOTALL)]
    return {
        "train": [body for at, body in enumerate(found) if at % 10 < 8],
        "validation": found[8::10],
        "held_out": found[9::10],
    }


def answers(rows: list[tuple[str, str]], tokenizer: Any, tokens: int) -> Iterator[Record]:
    """A record for each question with its answer; those longer than `tokens` are left out."""
    for prompt, answer in rows:
        ids = tokenizer(prompt)["input_ids"]
        whole = [*ids, *tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(whole) <= tokens:
            yield whole, len(ids)


def windows(texts: list[str], tokenizer: Any, tokens: int) -> Iterator[Record]:
    """Windows of `tokens` inside an article, opened by the start token; what is left at its end is not used."""
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for at in range(0, len(ids) - tokens + 2, tokens - 1):
            yield [tokenizer.bos_token_id, *ids[at : at + tokens - 1]], 1


def batch_of(records: list[Record]) -> dict[str, Tensor]:
    """Records padded on the right, where causal attention never sees it.  # input_ids, labels: (records, longest)"""
    longest = max(len(ids) for ids, _ in records)
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in records])
    labels = [[*[IGNORED] * skipped, *ids[skipped:], *[IGNORED] * (longest - len(ids))] for ids, skipped in records]
    return {"input_ids": ids, "labels": torch.tensor(labels)}


def batches(records: list[Record], size: int, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """The same batches in the same order for every method: shuffled anew each pass."""
    random, order = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        if len(order) < size:
            order = [*order, *torch.randperm(len(records), generator=random).tolist()]
        taken, order = order[:size], order[size:]
        yield batch_of([records[at] for at in taken])
