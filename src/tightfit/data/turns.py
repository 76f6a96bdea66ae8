"""Turns: a record as token ids, with a mask of what is learned: answers, found by chat template or written in a plain form of our own."""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tightfit.data.records import Records
from tightfit.terms.errors import TightfitError
from tightfit.terms.tuning import Learn

Row = tuple[list[int], list[bool]]
"""Token ids of a sample, and which of them count."""

Segment = tuple[str, str, bool]
"""What stands before an answer, the answer, and whether it is learned. A conversation is a list of them."""

PLAIN_FORM = "turns are written as `### Instruction:` and `### Response:`"

_HEADS = {"system": "", "developer": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
_GENERATION = re.compile(r"\{%-?\s*generation\b")


def token_ids(tokenizer: Any, texts: Sequence[str], **options: Any) -> Any:
    """Texts tokenized at once, without the tokens that the tokenizer itself would put around them."""
    quiet = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}  # `verbose` warns of long texts
    return tokenizer(list(texts), **{"add_special_tokens": False, **quiet, **options}) if texts else {"input_ids": []}


def opening(tokenizer: Any) -> list[int]:
    """The token that the tokenizer opens a text with (`<s>`), if it does."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []


def ending(tokenizer: Any) -> list[int]:
    """The token that ends a text, if the tokenizer has one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def rows_of(records: Records, start: int, stop: int, tokenizer: Any, learn: Learn) -> list[Row]:
    """The records from `start` to `stop` for a decoder. Raises `TightfitError` for a conversation that the chat template cannot write."""
    items = records.items[start:stop]
    if records.kind == "text":
        begin, end = opening(tokenizer), ending(tokenizer)
        rows = ([*begin, *ids, *end] for ids in token_ids(tokenizer, [item["text"] for item in items])["input_ids"])
        return [(ids, [True] * len(ids)) for ids in rows]
    if records.kind == "completion" or not tokenizer.chat_template:
        rows = _rows_of_segments([_segments(records.kind, item) for item in items], tokenizer)
    else:
        rows = _rows_of_chats([_as_chat(records.kind, item) for item in items], start + 1, tokenizer, marked=learn == "completion")
    return rows if learn == "completion" else [(ids, [True] * len(ids)) for ids, _ in rows]


def sides_of(records: Records, start: int, stop: int, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """The records from `start` to `stop` for an encoder and a decoder: what is asked and what is answered, each as the model expects it.

    Of a conversation the last answer is learned; the turns before it stand one below the other, parted by blank lines.
    """
    pairs = [_asked_and_answered(records.kind, item) for item in records.items[start:stop]]
    asked = token_ids(tokenizer, [pair[0] for pair in pairs], add_special_tokens=True)["input_ids"]
    answers = tokenizer(text_target=[pair[1] for pair in pairs], verbose=False)["input_ids"]
    end = ending(tokenizer)
    return [(ids, labels if labels[-1:] == end else labels + end) for ids, labels in zip(asked, answers, strict=True)]


def _asked_and_answered(kind: str, item: dict[str, Any]) -> tuple[str, str]:
    if kind == "completion":
        return item["prompt"], item["completion"]
    messages, _ = _as_chat(kind, item)
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return "\n\n".join(_content(message) for message in messages[:last]), _content(messages[last])


def _as_chat(kind: str, item: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """The messages of a record, and the number of the first that may be learned."""
    if kind == "messages":
        return item["messages"], item["learn_from"]
    asked = "\n\n".join(part for part in (item["instruction"], item["input"]) if part)
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": item["output"]}], 0


def _content(message: dict[str, Any]) -> str:
    return message.get("content") or json.dumps(message["tool_calls"])


def _segments(kind: str, item: dict[str, Any]) -> list[Segment]:
    """A record in our plain form (after Alpaca's). Turns behind the last answer are left out."""
    if kind == "completion":
        return [(item["prompt"], item["completion"], True)]
    if kind == "instruction":
        asked = f"### Input:\n{item['input']}\n\n" if item["input"] else ""
        return [(f"### Instruction:\n{item['instruction']}\n\n{asked}### Response:\n", item["output"], True)]
    segments: list[Segment] = []
    before = ""
    for number, message in enumerate(item["messages"]):
        head = _HEADS.get(message["role"], "### Tool:\n")
        if message["role"] == "assistant":
            segments.append((before + head, _content(message), number >= item["learn_from"]))
            before = "\n\n"
        else:
            before += f"{head}{_content(message)}\n\n"
    return segments


def _rows_of_segments(conversations: list[list[Segment]], tokenizer: Any) -> list[Row]:
    """Each answer behind what stands before it, ended by the end token.

    Tokenized together, unless tokens would then reach across: what is asked must have the tokens that it has alone, when the model answers.
    """
    flat = [segment for conversation in conversations for segment in conversation]
    before = token_ids(tokenizer, [segment[0] for segment in flat])["input_ids"]
    joined = token_ids(tokenizer, [segment[0] + segment[1] for segment in flat])["input_ids"]
    apart = [i for i, ids in enumerate(joined) if ids[: len(before[i])] != before[i]]
    for i, ids in zip(apart, token_ids(tokenizer, [flat[i][1] for i in apart])["input_ids"], strict=True):
        joined[i] = before[i] + ids
    rows, at = [], 0
    begin, end = opening(tokenizer), ending(tokenizer)
    for conversation in conversations:
        ids, counted = list(begin), [False] * len(begin)
        for i in range(at, at + len(conversation)):
            ids += joined[i] + end
            counted += [False] * len(before[i]) + [flat[i][2]] * (len(joined[i]) - len(before[i]) + len(end))
        rows.append((ids, counted))
        at += len(conversation)
    return rows


def _rows_of_chats(chats: list[tuple[list[dict[str, Any]], int]], first: int, tokenizer: Any, marked: bool) -> list[Row]:
    """Conversations as the chat template writes them; the first is the record number `first`. Unless `marked`, nothing counts."""
    template = tokenizer.get_chat_template()
    known = _GENERATION.search(template) and tokenizer.is_fast
    if marked and known and not any(message["role"] == "assistant" for chat, begin in chats for message in chat[:begin]):
        return _rows_by_marks([chat for chat, _ in chats], first, tokenizer)
    texts, spans, bare = [], [], []
    for number, (chat, begin) in enumerate(chats, start=first):
        write = _writer(tokenizer, number)
        text = write(chat)
        texts.append(text)
        spans.append(_answers(write, chat, begin, text, number) if marked else [])
        answer = (chat[-1].get("content") or "").strip()
        bare.append(chat[-1]["role"] == "assistant" and bool(answer) and text.rstrip().endswith(answer))
    end = ending(tokenizer)
    rows = _counted(tokenizer, texts, spans)
    return [
        (ids + end, counted + [True] * len(end)) if open_end else (ids, counted)
        for (ids, counted), open_end in zip(rows, bare, strict=True)
    ]


def _rows_by_marks(chats: list[list[dict[str, Any]]], first: int, tokenizer: Any) -> list[Row]:
    """By the template's own `{% generation %}` marks."""
    try:
        found = tokenizer.apply_chat_template(
            chats, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"return_attention_mask": False, "verbose": False}
        )
    except Exception:
        for number, chat in enumerate(chats, start=first):  # which one it was
            _writer(tokenizer, number)(chat)
        raise
    return [(ids, [bool(bit) for bit in mask]) for ids, mask in zip(found["input_ids"], found["assistant_masks"], strict=True)]


def _writer(tokenizer: Any, number: int) -> Callable[..., str]:
    """The template, whose complaints name the record."""

    def write(messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template may raise anything
            said = (str(error).splitlines() or [""])[0]
            raise TightfitError(
                f"the chat template cannot write record {number}: {said}", hint="mend the record, or give the tokenizer another template"
            ) from error

    return write


def _answers(write: Callable[..., str], chat: list[dict[str, Any]], begin: int, text: str, number: int) -> list[tuple[int, int]]:
    """Where the answers stand in `text`, each with what ends its turn, by writing ever more of the conversation.

    Templates may add a thought before an answer and drop earlier ones (Qwen3, DeepSeek-R1): then the answer itself must stand there.
    """
    spans: list[tuple[int, int]] = []
    reached = 0
    for i, message in enumerate(chat):
        if message["role"] != "assistant" or i < begin:
            continue
        content = (message.get("content") or "").strip()
        asked = write(chat[:i], add_generation_prompt=True) if i else ""
        done = text if i == len(chat) - 1 else write(chat[: i + 1])
        start = _shared(asked, text)
        if i == 0 or start < reached or not (start == len(asked) or (content and text.startswith(content, start))):
            raise _unstable(number, i)
        if text.startswith(done):
            reached = len(done)
        else:
            tail = content + done.rpartition(content)[2] if content else ""
            if not tail or not text.startswith(tail, start):
                raise _unstable(number, i)
            reached = start + len(tail)
        spans.append((start, reached))
    return spans


def _shared(prefix: str, text: str) -> int:
    """How many characters both begin with."""
    if text.startswith(prefix):
        return len(prefix)
    return next((i for i, (one, other) in enumerate(zip(prefix, text, strict=False)) if one != other), min(len(prefix), len(text)))


def _unstable(number: int, turn: int) -> TightfitError:
    return TightfitError(
        f"record {number}: the answer in message {turn + 1} cannot be told from what the chat template writes around it",
        hint="mark answers in the template with `{% generation %}`, or learn every token with `--learn all`",
    )


def _counted(tokenizer: Any, texts: list[str], spans: list[list[tuple[int, int]]]) -> list[Row]:
    """Token ids, and which of them lie in the spans of characters."""
    if not tokenizer.is_fast:
        return [_counted_by_prefix(tokenizer, text, places) for text, places in zip(texts, spans, strict=True)]
    found = token_ids(tokenizer, texts, return_offsets_mapping=True)
    return [
        (ids, _inside(offsets, places)) for ids, offsets, places in zip(found["input_ids"], found["offset_mapping"], spans, strict=True)
    ]


def _inside(offsets: Iterable[tuple[int, int]], places: list[tuple[int, int]]) -> list[bool]:
    """A token of white space only may have no width (byte-level tokenizers trim it): it begins where the last one ended."""
    counted, last = [], 0
    for start, stop in offsets:
        begin = start if start < stop else min(last, start)
        counted.append(any(begin < end and stop > first for first, end in places))
        last = stop
    return counted


def _counted_by_prefix(tokenizer: Any, text: str, places: list[tuple[int, int]]) -> Row:
    """For tokenizers that do not say where a token stands: it is found by the number of tokens before it."""
    cuts = [cut for place in places for cut in place]
    ids, *prefixes = token_ids(tokenizer, [text, *(text[:cut] for cut in cuts)])["input_ids"]
    if any(ids[: len(prefix)] != prefix for prefix in prefixes):
        raise TightfitError(
            "the tokenizer joins an answer with what the chat template writes around it",
            hint="learn every token with `--learn all`",
        )
    counted = [False] * len(ids)
    for start, stop in zip(prefixes[::2], prefixes[1::2], strict=True):
        counted[len(start) : len(stop)] = [True] * (len(stop) - len(start))
    return ids, counted
