"""Text: records as samples of token ids, their order, and the batches made of them."""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tightfit.data.records import Records
from tightfit.data.samples import IGNORED, Samples, without_unlearned
from tightfit.data.turns import PLAIN_FORM, ending, opening, rows_of, sides_of, token_ids
from tightfit.terms.errors import TightfitError
from tightfit.terms.tuning import Learn

_RECORDS = 512  # tokenized at once: enough for a fast tokenizer's threads
_CHARACTERS = 1 << 20  # of a plain text tokenized at once: a tokenizer takes some hundred bytes for each

Progress = Callable[[int, int], None]


def encode_records(
    records: Records,
    tokenizer: Any,
    max_tokens: int,
    learn: Learn = "completion",
    packing: bool = False,
    encoder_decoder: bool = False,
    vocabulary: int | None = None,
    progress: Progress | None = None,
) -> Samples:
    """`records` as samples of at most `max_tokens` tokens, cut at their end.

    - Conversations are written by the tokenizer's chat template, else as `### Instruction:` and `### Response:`; instructions too.
    - `learn="completion"`: answers count, with the tokens that end them; `all`: every token, as in any case in a text.
    - A plain text is cut into windows that do not overlap. With `packing` so are all samples, one behind the other, ended by the end token
      (TRL's `wrapped`). Nothing is masked: a sample may see its neighbour, and go on in the next window.
    - `encoder_decoder`: the prompt is read, the completion learned, each at most `max_tokens` long.

    `progress(done, whole)` counts records, or characters of a plain text. Raises `TightfitError` without a tokenizer, when nothing is
    left to learn, and for ids beyond `vocabulary`.
    """
    _check(records, tokenizer, max_tokens, packing, encoder_decoder)
    flat = _flattened(records, tokenizer, max_tokens, learn, packing, encoder_decoder, progress or (lambda done, whole: None))
    notes = _notes(flat, records, tokenizer, max_tokens, encoder_decoder)
    windows = packing or records.kind == "plain"
    samples = without_unlearned(_samples(flat, max_tokens if windows else 0, shifted=not encoder_decoder))
    if not len(samples):
        raise TightfitError(
            f"none of {len(records.items)} samples has anything to learn within {max_tokens} tokens",
            hint="take longer samples with `--context`, or learn every token with `--learn all`",
        )
    if windows and records.kind != "plain":
        notes.append(f"packed into {len(samples)} samples of {max_tokens} tokens, in which a sample may see the one before it")
    _check_vocabulary(samples, vocabulary)
    return _signed(samples, tuple(notes))


class _Flat:
    """Samples as they are made, and what became of those that were not."""

    def __init__(self) -> None:
        self.ids, self.labels = array("i"), array("i")
        self.starts, self.label_starts = array("q", [0]), array("q", [0])
        self.cut = self.dropped = 0

    def add(self, ids: list[int], labels: list[int]) -> None:
        self.ids.extend(ids)
        self.labels.extend(labels)
        self.starts.append(len(self.ids))
        self.label_starts.append(len(self.labels))


def _flattened(
    records: Records, tokenizer: Any, max_tokens: int, learn: Learn, packing: bool, encoder_decoder: bool, progress: Progress
) -> _Flat:
    flat = _Flat()
    if records.kind == "plain":
        _add_plain(flat, records.items[0]["text"], tokenizer, progress)
        return flat
    for start in range(0, len(records.items), _RECORDS):
        stop = min(start + _RECORDS, len(records.items))
        if encoder_decoder:
            _add_sides(flat, sides_of(records, start, stop, tokenizer), max_tokens, frozenset(tokenizer.all_special_ids))
        else:
            _add_rows(flat, rows_of(records, start, stop, tokenizer, learn), max_tokens, ending(tokenizer) if packing else None)
        progress(stop, len(records.items))
    return flat


def _check(records: Records, tokenizer: Any, max_tokens: int, packing: bool, encoder_decoder: bool) -> None:
    if tokenizer is None:
        raise TightfitError(
            "there is no tokenizer, and the data is text", hint="name a model with a tokenizer: a folder or a hub id, not a preset"
        )
    if max_tokens < 2:
        raise TightfitError(f"{max_tokens} tokens leave nothing to predict", hint="take longer samples, such as `--context 512`")
    if encoder_decoder and records.kind in ("plain", "text"):
        raise TightfitError(
            "an encoder–decoder model learns answers, and a text has none", hint="give `prompt` and `completion` in a `.jsonl` file"
        )
    if encoder_decoder and packing:
        raise TightfitError("samples of an encoder–decoder model cannot be packed", hint="leave out `--packing`")


def _check_vocabulary(samples: Samples, vocabulary: int | None) -> None:
    largest = int(max(samples.ids.max(), samples.labels.max()))
    if vocabulary is not None and largest >= vocabulary:
        raise TightfitError(
            f"the tokenizer writes the token {largest}, and the model knows {vocabulary}", hint="use the tokenizer that the model came with"
        )


def _add_rows(flat: _Flat, rows: list[tuple[list[int], list[bool]]], max_tokens: int, between: list[int] | None) -> None:
    """Samples for a decoder: cut, or whole where they will be packed, with the end token `between` them."""
    for ids, counted in rows:
        if between is None:
            flat.cut += len(ids) > max_tokens
            ids, counted = ids[:max_tokens], counted[:max_tokens]
        elif between and between[0] not in ids[-2:]:  # a template's end of turn may be followed by a line feed
            ids, counted = ids + between, [*counted, False]
        if any(counted[1:]):
            flat.add(ids, [token if counts else IGNORED for token, counts in zip(ids, counted, strict=True)])
        else:
            flat.dropped += 1


def _add_sides(flat: _Flat, sides: list[tuple[list[int], list[int]]], max_tokens: int, special: frozenset[int]) -> None:
    """Samples for an encoder and a decoder. A prompt that is cut keeps the token that closes it."""
    for ids, labels in sides:
        if not ids or not labels:
            flat.dropped += 1
            continue
        flat.cut += max(len(ids), len(labels)) > max_tokens
        if len(ids) > max_tokens and ids[-1] in special:
            ids = ids[: max_tokens - 1] + ids[-1:]
        flat.add(ids[:max_tokens], labels[:max_tokens])


def _add_plain(flat: _Flat, text: str, tokenizer: Any, progress: Progress) -> None:
    """One long text, some lines at a time: where one part ends, a token may be another one than in the whole."""
    flat.ids.extend(opening(tokenizer))
    done = 0
    for part in _parts(text):
        flat.ids.extend(token_ids(tokenizer, [part])["input_ids"][0])
        done += len(part)
        progress(done, len(text))
    flat.labels = flat.ids


def _parts(text: str) -> Iterator[str]:
    """Of about `_CHARACTERS` each, to the end of a line."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _CHARACTERS) + 1 or len(text)
        yield text[start:stop]
        start = stop


def _samples(flat: _Flat, window: int, shifted: bool) -> Samples:
    """All in one go, in windows if they have a size."""
    ids, labels = np.frombuffer(flat.ids, np.int32), np.frombuffer(flat.labels, np.int32)
    if shifted and np.array_equal(ids, labels):
        labels = ids  # every token counts: kept once
    if window:
        starts = np.append(np.arange(0, len(ids), window, dtype=np.int64), len(ids))
        return Samples(ids, labels, starts, starts, shifted)
    starts = np.frombuffer(flat.starts, np.int64)
    return Samples(ids, labels, starts, starts if shifted else np.frombuffer(flat.label_starts, np.int64), shifted)


def _signed(samples: Samples, notes: tuple[str, ...]) -> Samples:
    digest = hashlib.sha256()
    for part in (samples.ids, samples.labels, samples.starts, samples.label_starts):
        digest.update(np.ascontiguousarray(part))
    return Samples(samples.ids, samples.labels, samples.starts, samples.label_starts, samples.shifted, notes, digest.hexdigest())


def _notes(flat: _Flat, records: Records, tokenizer: Any, max_tokens: int, encoder_decoder: bool) -> list[str]:
    count, notes = len(records.items), []
    if records.kind in ("messages", "instruction") and not tokenizer.chat_template and not encoder_decoder:
        notes.append(f"the tokenizer has no chat template: {PLAIN_FORM}")
    if tokenizer.eos_token_id is None:
        notes.append("the tokenizer has no end token: the model does not learn where to stop")
    if flat.cut:
        notes.append(f"{flat.cut} of {count} samples were cut to {max_tokens} tokens")
    if flat.dropped:
        notes.append(f"{flat.dropped} of {count} samples were dropped: nothing in them is left to learn")
    return notes


def collate(samples: Samples, indices: Sequence[int], encoder_decoder: bool = False) -> dict[str, Tensor]:
    """A batch, padded on the right.  # input_ids: (rows, longest), labels: the same, or (rows, longest answer)

    An `attention_mask` comes only with prompts for an encoder: a decoder never looks at what comes later, so any id will pad it.
    """
    rows = [samples.sample(i) for i in indices]
    lengths = [len(ids) for ids, _ in rows]
    batch = {
        "input_ids": _padded([ids for ids, _ in rows], 0),
        "labels": _padded([labels for _, labels in rows], IGNORED),
    }
    if encoder_decoder:
        batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return batch


def _padded(rows: list[np.ndarray], value: int) -> Tensor:
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for row, part in zip(padded, rows, strict=True):
        row[: len(part)] = torch.from_numpy(part)
    return padded


@dataclass(frozen=True)
class Order:
    """Which samples each step takes: every one once an epoch, shuffled anew. It depends on these numbers only, so a run can be resumed."""

    count: int
    batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch takes what is left, which may be less than a batch."""
        return -(-self.count // self.batch)

    def indices(self, step: int) -> list[int]:
        """The samples of the step number `step`, counted from 0 through all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return list(_shuffled(self.count, self.seed, epoch)[place * self.batch : (place + 1) * self.batch])


def batches_of_epoch(count: int, batch: int, seed: int, epoch: int) -> list[list[int]]:
    """All batches of one epoch in order."""
    order = Order(count, batch, seed)
    return [order.indices(epoch * order.steps_per_epoch + place) for place in range(order.steps_per_epoch)]


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Seeded by a hash: neighbouring seeds and epochs have nothing in common."""
    mixed = int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8], "little") >> 1
    return tuple(torch.randperm(count, generator=torch.Generator().manual_seed(mixed)).tolist())


def split_rows(lengths: Sequence[int], rows: int, tokens: int) -> list[list[int]]:
    """A batch as micro-batches that take no more memory than the planned one of `rows` rows of `tokens` tokens; positions, in order.

    A padded length beyond `tokens` has fewer rows: their tokens, and the squares that attention may hold, are no more than planned.
    Raises `TightfitError` for a row that is too long by itself.
    """
    parts: list[list[int]] = []
    longest = 0
    for position, length in enumerate(lengths):
        if not _fits(1, length, rows, tokens):
            raise TightfitError(
                f"a sample has {length} tokens, more than the planned micro-batch of {rows} × {tokens} holds",
                hint=f"plan for longer samples with `--context {length}`",
            )
        longest = max(longest, length)
        if parts and _fits(len(parts[-1]) + 1, longest, rows, tokens):
            parts[-1].append(position)
        else:
            parts.append([position])
            longest = length
    return parts


def _fits(rows: int, length: int, planned_rows: int, tokens: int) -> bool:
    if length <= tokens:
        return rows <= planned_rows
    return rows * length * length <= planned_rows * tokens * tokens  # and so rows · length <= planned_rows · tokens
