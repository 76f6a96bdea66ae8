"""Text: which tokens a sample has and which of them are learned, packing, the order of samples, batches and their parts."""

import json
import random
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

import tightfit.data.text
from tightfit.data.records import Records, read_records
from tightfit.data.text import Order, Samples, batches_of_epoch, collate, encode_records, split_rows
from tightfit.terms.errors import TightfitError

TURNS = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content | trim }} <end>\n{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }} <end>\n"
    "{% endgeneration %}{% else %}{{ m.content | trim }} <end>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WORDS = ["</s>", "<s>", "<?>", "<system>", "<user>", "<assistant>", "<end>", "###", "Instruction:", "Response:", "Input:", "Tool:"]
LETTERS = list("abcdefghij")


def words(template: str | None = None) -> PreTrainedTokenizerFast:
    """Each word a token, the white space between them none."""
    known = {word: number for number, word in enumerate(WORDS + LETTERS)}
    backend = Tokenizer(models.WordLevel(known, unk_token="<?>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<?>", eos_token="</s>", chat_template=template)


def bytes_level(template: str | None = None) -> Any:
    """The demo model's: byte-level BPE that opens a text with `<s>`."""
    tokenizer = AutoTokenizer.from_pretrained(Path(tightfit.data.text.__file__).parents[1] / "presets" / "tightfit-demo")
    tokenizer.chat_template = template
    return tokenizer


def chat(*turns: str, learn_from: int = 0) -> dict[str, Any]:
    """A conversation of `u:…`, `a:…` and `s:…`."""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns], "learn_from": learn_from}


def shown(samples: Samples, tokenizer: Any) -> list[tuple[str, str]]:
    """Tokens and labels of each sample as words, `_` where nothing counts."""
    return [
        (
            " ".join(tokenizer.convert_ids_to_tokens(ids)),
            " ".join("_" if i < 0 else tokenizer.convert_ids_to_tokens(int(i)) for i in labels),
        )
        for ids, labels in map(samples.sample, range(len(samples)))
    ]


def texts(*parts: str) -> Records:
    return Records([{"text": part} for part in parts], "text")


def test_texts_count_whole() -> None:
    tokenizer = words()
    samples = encode_records(texts("a b c", "d"), tokenizer, 8)
    assert shown(samples, tokenizer) == [("a b c </s>", "a b c </s>"), ("d </s>", "d </s>")]
    assert (samples.tokens, samples.counted_tokens, samples.longest, samples.notes) == (6, 4, 4, ())  # a first token is never predicted
    assert samples.ids.dtype == np.int32 and samples.labels is samples.ids
    assert samples.held_bytes == 6 * 4 + 3 * 8


def test_completions() -> None:
    tokenizer = words()
    records = Records([{"prompt": "a b", "completion": " c"}, {"prompt": "d", "completion": "\ne f"}], "completion")
    assert shown(encode_records(records, tokenizer, 8), tokenizer) == [("a b c </s>", "_ _ c </s>"), ("d e f </s>", "_ e f </s>")]
    whole = encode_records(records, tokenizer, 8, learn="all")
    assert shown(whole, tokenizer)[0] == ("a b c </s>", "a b c </s>")
    assert whole.counted_tokens == 6


def test_a_prompt_has_the_tokens_that_it_has_alone() -> None:
    """Tokens of the prompt and the completion together would be others where both meet."""
    tokenizer = bytes_level()
    for prompt, completion in [("Once upon a ti", "me there"), ("Once upon", " a time"), ("a ", "b")]:
        ids, labels = encode_records(Records([{"prompt": prompt, "completion": completion}], "completion"), tokenizer, 64).sample(0)
        asked = tokenizer(prompt)["input_ids"]
        assert asked[0] == tokenizer.bos_token_id
        assert ids[: len(asked)].tolist() == asked
        assert labels.tolist() == [-100] * len(asked) + ids[len(asked) :].tolist()
        assert tokenizer.decode(ids[len(asked) :]) == completion + "</s>"
    joined = encode_records(Records([{"prompt": "Once upon", "completion": " a time"}], "completion"), tokenizer, 64).sample(0)[0]
    assert joined.tolist() == [*tokenizer("Once upon a time")["input_ids"], tokenizer.eos_token_id]


def test_plain_form_without_a_template() -> None:
    tokenizer = words()
    asked = "### Instruction: a"
    records = Records(
        [{"instruction": "a", "input": "", "output": "c"}, {"instruction": "a", "input": "b", "output": "c"}],
        "instruction",
    )
    samples = encode_records(records, tokenizer, 32)
    assert shown(samples, tokenizer) == [
        (f"{asked} ### Response: c </s>", "_ _ _ _ _ c </s>"),
        (f"{asked} ### Input: b ### Response: c </s>", "_ _ _ _ _ _ _ _ c </s>"),
    ]
    assert samples.notes == ("the tokenizer has no chat template: turns are written as `### Instruction:` and `### Response:`",)
    turns = Records([chat("s:j", "u:a", "a:c", "t:d", "u:e", "a:f", "u:g"), chat("u:a", "a:b", "u:c", "a:d", learn_from=3)], "messages")
    assert shown(encode_records(turns, tokenizer, 32), tokenizer) == [
        (
            f"j {asked} ### Response: c </s> ### Tool: d ### Instruction: e ### Response: f </s>",
            "_ _ _ _ _ _ c </s> _ _ _ _ _ _ _ _ f </s>",
        ),
        (f"{asked} ### Response: b </s> ### Instruction: c ### Response: d </s>", "_ _ _ _ _ _ _ _ _ _ _ _ d </s>"),
    ]


def test_plain_form_to_the_letter() -> None:
    tokenizer = bytes_level()
    ids, labels = encode_records(Records([chat("s:Be kind.", "u:Hi", "a:Ho", "u:Hi", "a:No")], "messages"), tokenizer, 256).sample(0)
    asked = "### Instruction:\nHi\n\n### Response:\n"
    assert tokenizer.decode(ids) == f"<s>Be kind.\n\n{asked}Ho</s>\n\n{asked}No</s>"
    assert tokenizer.decode(labels[labels >= 0]) == "Ho</s>No</s>"


CHATS = [
    (chat("u:a", "a:b c"), "<user> a <end> <assistant> b c <end>", "_ _ _ _ b c <end>"),
    (
        chat("s:j", "u:a", "a:b", "u:c", "a:d"),
        "<system> j <end> <user> a <end> <assistant> b <end> <user> c <end> <assistant> d <end>",
        "_ _ _ _ _ _ _ b <end> _ _ _ _ d <end>",
    ),
    (chat("u:a", "a:b", "u:c"), "<user> a <end> <assistant> b <end> <user> c <end>", "_ _ _ _ b <end> _ _ _"),
    (
        chat("u:a", "a:b", "u:c", "a:d", learn_from=3),
        "<user> a <end> <assistant> b <end> <user> c <end> <assistant> d <end>",
        "_ _ _ _ _ _ _ _ _ _ d <end>",
    ),
]


@pytest.mark.parametrize("template", [TURNS, MARKED])
def test_chats(template: str) -> None:
    tokenizer = words(template)
    samples = encode_records(Records([item for item, _, _ in CHATS], "messages"), tokenizer, 64)
    assert shown(samples, tokenizer) == [(ids, labels) for _, ids, labels in CHATS]
    assert samples.notes == ()
    for i, (item, _, _) in enumerate(CHATS):
        assert samples.sample(i)[0].tolist() == tokenizer.apply_chat_template(item["messages"])["input_ids"]
    whole = encode_records(Records([CHATS[1][0]], "messages"), tokenizer, 64, learn="all")
    assert shown(whole, tokenizer) == [(CHATS[1][1], CHATS[1][1])]
    asked = Records([{"instruction": "a", "input": "b", "output": "c"}], "instruction")
    assert shown(encode_records(asked, tokenizer, 64), tokenizer) == [("<user> a b <end> <assistant> c <end>", "_ _ _ _ _ c <end>")]


def random_chat(generator: random.Random) -> dict[str, Any]:
    pieces = ["Once", " upon", "\n", "é", "🙂 ", "  ", "<end>", ".", "x" * 9, "日本"]
    turns = []
    for _ in range(generator.randint(1, 4)):
        turns += [who + "".join(generator.choices(pieces, k=generator.randint(1, 8))) + "!" for who in ("u:", "a:")]
    return chat(*turns)


def test_marks_and_prefixes_agree() -> None:
    """Two ways to the same answers: the template's marks by transformers, and ever longer conversations."""
    generator = random.Random(0)
    records = Records([random_chat(generator) for _ in range(60)], "messages")
    by_marks = encode_records(records, bytes_level(MARKED.replace("> ", ">\n")), 512)
    by_prefix = encode_records(records, bytes_level(TURNS.replace("> ", ">\n")), 512)
    assert by_marks.digest == by_prefix.digest
    tokenizer = bytes_level()
    for i, item in enumerate(records.items):
        ids, labels = by_marks.sample(i)
        answers = [f"{message['content'].strip()} <end>\n" for message in item["messages"] if message["role"] == "assistant"]
        assert tokenizer.decode(labels[labels >= 0]) == "".join(answers)
        assert tokenizer.decode(ids).count("<user>") == len(item["messages"]) // 2


def test_white_space_belongs_to_its_turn() -> None:
    """Byte-level tokenizers give a token of spaces only no width."""
    tokenizer = bytes_level(TURNS.replace("> ", ">\n").replace("<end>\n", "<end> "))
    _, labels = encode_records(Records([chat("u:a", "a:b  c")], "messages"), tokenizer, 64).sample(0)
    assert tokenizer.decode(labels[labels >= 0]) == "b  c <end> "


def test_marks_are_the_templates_own() -> None:
    """With marks around less than the turn, only that is learned."""
    tokenizer = words(MARKED.replace(" <end>\n{% endgeneration %}", "{% endgeneration %} <end>\n"))
    assert shown(encode_records(Records([CHATS[0][0]], "messages"), tokenizer, 64), tokenizer) == [(CHATS[0][1], "_ _ _ _ b c _")]


def test_tokenizers_without_offsets() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = TURNS
    assert not tokenizer.is_fast
    ids, labels = encode_records(Records([chat("u:hi", "a:hé", "u:so", "a:no")], "messages"), tokenizer, 256).sample(0)
    text = "<user> hi <end>\n<assistant> hé <end>\n<user> so <end>\n<assistant> no <end>\n"
    assert ids.tolist() == [byte + 3 for byte in text.encode()]
    counted = bytearray(b"_" * len(text.encode()))
    for answer in ("hé <end>\n".encode(), b"no <end>\n"):
        at = text.encode().index(answer)
        counted[at : at + len(answer)] = answer
    assert labels.tolist() == [-100 if byte == ord("_") else byte + 3 for byte in counted]


THOUGHTS = (  # as Qwen3's does: the last answer has a thought, earlier ones have lost theirs
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' and loop.last %}h {% endif %}{{ m.content }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
OPENED = (  # as DeepSeek-R1's does: an answer is asked for with an open thought, which no written conversation has
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end>\n{% endfor %}{% if add_generation_prompt %}<assistant> h {% endif %}"
)


def test_templates_that_rewrite_earlier_turns() -> None:
    records = Records([chat("u:a", "a:b", "u:c", "a:d")], "messages")
    ids = "<user> a <end> <assistant> b <end> <user> c <end> <assistant> d <end>"
    tokenizer = words(THOUGHTS)
    assert shown(encode_records(records, tokenizer, 64), tokenizer) == [
        (ids.replace("d <end>", "h d <end>"), "_ _ _ _ b <end> _ _ _ _ h d <end>")
    ]
    tokenizer = words(OPENED)
    assert shown(encode_records(records, tokenizer, 64), tokenizer) == [(ids, "_ _ _ _ b <end> _ _ _ _ d <end>")]


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        ("{{ messages | length }} {{ messages[-1].content }}", ("u:a", "a:b"), "record 2: the answer in message 2 cannot be told"),
        (TURNS.replace("<{{ m.role }}>", "{% if not loop.last %}j {% endif %}<{{ m.role }}>"), ("u:a", "a:b", "u:c"), "message 2 cannot"),
        (TURNS, ("a:a", "u:b", "a:c"), "record 2: the answer in message 1 cannot be told"),
        ("{{ raise_exception('roles must alternate') }}", ("u:a", "a:b"), "cannot write record 2: roles must alternate"),
        (MARKED + "{{ raise_exception('no') }}", ("u:a", "a:b"), "the chat template cannot write record 2: no"),
        ("{{ messages", ("u:a", "a:b"), "the chat template cannot write record 1: "),
    ],
)
def test_templates_that_cannot_be_followed(template: str, turns: tuple[str, ...], message: str) -> None:
    """The first record is none of the template's trouble where it can be: the second is named."""
    first = "{% if messages[0].content == 'fine' %}<user> fine <end>\n{% if messages | length > 1 %}<assistant> b <end>\n{% endif %}"
    guarded = first + "{% if add_generation_prompt %}<assistant> {% endif %}{% else %}" + template + "{% endif %}"
    with pytest.raises(TightfitError, match=message) as caught:
        encode_records(Records([chat("u:fine", "a:b"), chat(*turns)], "messages"), words(guarded), 64)
    assert caught.value.hint


def test_an_answer_that_the_template_leaves_open_is_ended() -> None:
    tokenizer = words(
        "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    assert shown(encode_records(Records([chat("u:a", "a:b")], "messages"), tokenizer, 64), tokenizer) == [
        ("<user> a <assistant> b </s>", "_ _ _ b </s>")
    ]


def test_cut_and_dropped() -> None:
    tokenizer = words()
    items = [{"prompt": "a b c", "completion": "d"}, {"prompt": "a", "completion": "b c d"}, {"prompt": "a", "completion": "b"}]
    samples = encode_records(Records(items, "completion"), tokenizer, 3)
    assert shown(samples, tokenizer) == [("a b c", "_ b c"), ("a b </s>", "_ b </s>")]
    assert samples.notes == (
        "2 of 3 samples were cut to 3 tokens",
        "1 of 3 samples were dropped: nothing in them is left to learn",
    )
    with pytest.raises(TightfitError, match="none of 1 samples has anything to learn within 3 tokens") as caught:
        encode_records(Records(items[:1], "completion"), tokenizer, 3)
    assert "--context" in caught.value.hint and "--learn all" in caught.value.hint


def test_all_masked_by_the_template() -> None:
    silent = MARKED.replace("== 'assistant'", "== 'nobody'")
    with pytest.raises(TightfitError, match="none of 2 samples has anything to learn"):
        encode_records(Records([CHATS[0][0], CHATS[0][0]], "messages"), words(silent), 64)


def test_plain_text_is_cut_into_windows() -> None:
    tokenizer = words()
    samples = encode_records(Records([{"text": "a b c\nd e f g"}], "plain"), tokenizer, 3)
    assert shown(samples, tokenizer) == [("a b c", "a b c"), ("d e f", "d e f")]  # the last `g` alone would predict nothing
    assert (samples.tokens, samples.counted_tokens) == (6, 4)
    samples = encode_records(Records([{"text": "a b c\nd e f g h"}], "plain"), tokenizer, 3)
    assert shown(samples, tokenizer)[-1] == ("g h", "g h")
    with pytest.raises(TightfitError, match="none of 1 samples has anything to learn"):
        encode_records(Records([{"text": "a"}], "plain"), tokenizer, 3)


def test_long_plain_texts_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = bytes_level()
    text = "".join(f"Line {n}: once upon a time.\n" for n in range(50))
    whole = encode_records(Records([{"text": text}], "plain"), tokenizer, 16)
    assert whole.ids.tolist() == tokenizer(text)["input_ids"]
    monkeypatch.setattr(tightfit.data.text, "_CHARACTERS", 100)
    done: list[tuple[int, int]] = []
    parts = encode_records(Records([{"text": text}], "plain"), tokenizer, 16, progress=lambda *at: done.append(at))
    assert parts.digest == whole.digest
    assert len(done) > 5 and done[-1] == (len(text), len(text)) and done == sorted(done)


def test_packing() -> None:
    tokenizer = words()
    items = [{"prompt": "a b", "completion": "c"}, {"prompt": "d", "completion": "e f g"}, {"prompt": "h", "completion": "i"}]
    samples = encode_records(Records(items, "completion"), tokenizer, 4, packing=True)  # a b c | d e f g | h i, each with its end
    assert shown(samples, tokenizer) == [("a b c </s>", "_ _ c </s>"), ("d e f g", "_ e f g"), ("</s> h i </s>", "</s> _ i </s>")]
    assert samples.counted_tokens == 2 + 3 + 2
    assert samples.notes == ("packed into 3 samples of 4 tokens, in which a sample may see the one before it",)
    samples = encode_records(Records(items, "completion"), tokenizer, 7, packing=True)
    assert shown(samples, tokenizer) == [("a b c </s> d e f", "_ _ c </s> _ e f"), ("g </s> h i </s>", "g </s> _ i </s>")]


def test_packing_drops_windows_without_answers() -> None:
    tokenizer = words()
    records = Records([{"prompt": "a b c d e f", "completion": "g"}], "completion")
    samples = encode_records(records, tokenizer, 3, packing=True)  # a b c | d e f | g </s>
    assert shown(samples, tokenizer) == [("g </s>", "g </s>")]
    assert samples.tokens == 2


def test_packing_arithmetic() -> None:
    generator = random.Random(1)
    tokenizer = words()
    for _ in range(20):
        parts = [" ".join(generator.choices(LETTERS, k=generator.randint(1, 9))) for _ in range(generator.randint(1, 9))]
        size = generator.randint(2, 12)
        samples = encode_records(texts(*parts), tokenizer, size, packing=True)
        stream = " </s> ".join(parts) + " </s>"
        left = len(stream.split()) % size
        assert len(samples) == len(stream.split()) // size + (left > 1)
        assert samples.lengths[:-1].tolist() == [size] * (len(samples) - 1)
        assert " ".join(ids for ids, _ in shown(samples, tokenizer)) == " ".join(stream.split()[: -1 if left == 1 else None])
        assert samples.labels is samples.ids


def test_packed_chats_are_parted_by_the_end_token() -> None:
    tokenizer = words(TURNS)
    records = Records([chat("u:a", "a:b"), chat("u:c", "a:d")], "messages")
    one, other = "<user> a <end> <assistant> b <end> </s>", "<user> c <end> <assistant> d <end> </s>"
    assert shown(encode_records(records, tokenizer, 14, packing=True), tokenizer) == [
        (f"{one} {other}", "_ _ _ _ b <end> _ _ _ _ _ d <end> _")
    ]
    lines = bytes_level(TURNS.replace("<end>", "</s>"))  # a line feed follows the end token
    assert lines.decode(encode_records(records, lines, 99, packing=True).ids) == (
        "<user> a </s>\n<assistant> b </s>\n<user> c </s>\n<assistant> d </s>\n"
    )
    tokenizer.eos_token = "<end>"  # it stands there already
    assert shown(encode_records(records, tokenizer, 14, packing=True), tokenizer)[0][0] == f"{one} {other}".replace(" </s>", "")


def test_encoder_decoder() -> None:
    tokenizer = words()
    records = Records([{"prompt": "a b c", "completion": "d"}, {"prompt": "a", "completion": "e f g h"}], "completion")
    samples = encode_records(records, tokenizer, 3, encoder_decoder=True)
    assert shown(samples, tokenizer) == [("a b c", "d </s>"), ("a", "e f g")]
    assert (samples.tokens, samples.counted_tokens, samples.longest, samples.lengths.tolist()) == (4, 5, 3, [3, 3])
    assert samples.notes == ("1 of 2 samples were cut to 3 tokens",)
    asked = Records([{"instruction": "a", "input": "b", "output": "c"}], "instruction")
    assert shown(encode_records(asked, tokenizer, 9, encoder_decoder=True), tokenizer) == [("a b", "c </s>")]
    turns = Records([chat("s:a", "u:b", "a:c", "u:d", "a:e", "u:f")], "messages")
    assert shown(encode_records(turns, tokenizer, 9, encoder_decoder=True), tokenizer) == [("a b c d", "e </s>")]


def test_a_cut_prompt_keeps_what_closes_it() -> None:
    tokenizer = ByT5Tokenizer()  # writes `</s>` itself, as T5's
    ids, labels = encode_records(
        Records([{"prompt": "abcd", "completion": "xy"}], "completion"), tokenizer, 4, encoder_decoder=True
    ).sample(0)
    assert ids.tolist() == [ord(letter) + 3 for letter in "abc"] + [tokenizer.eos_token_id]
    assert labels.tolist() == [ord("x") + 3, ord("y") + 3, tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"tokenizer": None}, "there is no tokenizer", "a folder or a hub id"),
        ({"max_tokens": 1}, "1 tokens leave nothing to predict", "--context"),
        ({"encoder_decoder": True}, "an encoder–decoder model learns answers, and a text has none", "`prompt` and `completion`"),
        ({"vocabulary": 14}, "the tokenizer writes the token 14, and the model knows 14", "the tokenizer that the model came with"),
        (
            {"records": Records([{"text": "a b"}], "plain"), "encoder_decoder": True},
            "an encoder–decoder model learns answers",
            "`prompt` and `completion`",
        ),
        (
            {"records": Records([{"prompt": "a", "completion": "b"}], "completion"), "encoder_decoder": True, "packing": True},
            "cannot be packed",
            "--packing",
        ),
    ],
)
def test_what_cannot_be_encoded(changes: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(TightfitError, match=message) as caught:
        encode_records(**{"records": texts("a b c"), "tokenizer": words(), "max_tokens": 8} | changes)
    assert hint in caught.value.hint


def test_a_vocabulary_that_just_suffices() -> None:
    assert len(encode_records(texts("a b c"), words(), 8, vocabulary=15)) == 1


def test_without_an_end_token() -> None:
    tokenizer = words()
    tokenizer.eos_token = None
    samples = encode_records(texts("a b", "c"), tokenizer, 8)
    assert shown(samples, tokenizer) == [("a b", "a b")]
    assert samples.notes == (
        "the tokenizer has no end token: the model does not learn where to stop",
        "1 of 2 samples were dropped: nothing in them is left to learn",
    )


def test_many_records_keep_their_order(tmp_path: Path) -> None:
    generator = random.Random(2)
    lines = [" ".join(generator.choices(LETTERS, k=3)) for _ in range(1100)]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    done: list[tuple[int, int]] = []
    tokenizer = words()
    samples = encode_records(read_records(tmp_path / "x.jsonl"), tokenizer, 8, progress=lambda *at: done.append(at))
    assert [ids for ids, _ in shown(samples, tokenizer)] == [f"{line} </s>" for line in lines]
    assert done == [(512, 1100), (1024, 1100), (1100, 1100)]


def test_a_digest_is_of_everything() -> None:
    records = Records([{"prompt": "a", "completion": "b c"}], "completion")
    made = [
        encode_records(records, words(), 8),
        encode_records(records, words(), 8, learn="all"),
        encode_records(records, words(), 3),
        encode_records(texts("a", "b c"), words(), 8),
        encode_records(texts("a b", "c"), words(), 8),
    ]
    assert len({samples.digest for samples in made}) == len(made)
    assert encode_records(records, words(), 8).digest == made[0].digest


def test_collate() -> None:
    tokenizer = words()
    samples = encode_records(
        Records([{"prompt": "a", "completion": "b"}, {"prompt": "a b c", "completion": "d"}], "completion"), tokenizer, 8
    )
    a, b, c, d = tokenizer.convert_tokens_to_ids(["a", "b", "c", "d"])
    batch = collate(samples, [0, 1])
    assert {name: part.tolist() for name, part in batch.items()} == {
        "input_ids": [[a, b, 0, 0, 0], [a, b, c, d, 0]],
        "labels": [[-100, b, 0, -100, -100], [-100, -100, -100, d, 0]],
    }
    assert all(part.dtype == torch.int64 for part in batch.values())
    assert collate(samples, [1])["input_ids"].tolist() == [[a, b, c, d, 0]]


def test_collate_for_an_encoder() -> None:
    records = Records(
        [{"prompt": "a", "completion": "b c"}, {"prompt": "a b", "completion": "d"}, {"prompt": "c", "completion": "e"}], "completion"
    )
    tokenizer = words()
    samples = encode_records(records, tokenizer, 8, encoder_decoder=True)
    a, b, c, d = tokenizer.convert_tokens_to_ids(["a", "b", "c", "d"])
    batch = collate(samples, [0, 1], encoder_decoder=True)
    assert {name: part.tolist() for name, part in batch.items()} == {
        "input_ids": [[a, 0], [a, b]],
        "labels": [[b, c, 0], [d, 0, -100]],
        "attention_mask": [[1, 0], [1, 1]],
    }
    assert all(part.dtype == torch.int64 for part in batch.values())
    assert collate(samples, [0, 2], encoder_decoder=True)["attention_mask"].tolist() == [[1], [1]]  # always, as the plan foresees


def test_every_epoch_takes_every_sample_once() -> None:
    for count, batch in [(10, 3), (9, 3), (2, 5), (1, 1)]:
        batches = batches_of_epoch(count, batch, seed=3, epoch=2)
        assert len(batches) == Order(count, batch, 3).steps_per_epoch == -(-count // batch)
        assert sorted(chain.from_iterable(batches)) == list(range(count))
        assert {len(part) for part in batches[:-1]} <= {batch} and len(batches[-1]) == (count % batch or batch)


def test_order_is_a_matter_of_seed_and_epoch() -> None:
    orders = [tuple(map(tuple, batches_of_epoch(50, 7, seed, epoch))) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert batches_of_epoch(6, 4, seed=0, epoch=0) == [[5, 3, 4, 2], [0, 1]]  # a run that another version began goes on the same


def test_a_resumed_run_sees_the_same_batches() -> None:
    uninterrupted = [part for epoch in range(4) for part in batches_of_epoch(11, 4, seed=5, epoch=epoch)]
    for begin in (0, 2, 3, 7, 11):
        order = Order(11, 4, 5)
        torch.manual_seed(begin)  # no state of the process matters
        assert [order.indices(step) for step in range(begin, 12)] == uninterrupted[begin:]
    Order(11, 4, 5).indices(0).clear()
    assert Order(11, 4, 5).indices(0) == uninterrupted[0]


@pytest.mark.parametrize(
    ("lengths", "rows", "tokens", "parts"),
    [
        ([5, 5, 5, 5], 4, 5, [[0, 1, 2, 3]]),
        ([5, 5, 5, 5, 1], 2, 5, [[0, 1], [2, 3], [4]]),
        ([5, 8, 5], 4, 5, [[0], [1], [2]]),  # 4 · 25 = 100: two rows of 8 would be 128
        ([5, 7, 5], 4, 5, [[0, 1], [2]]),  # two rows of 7 are 98, three 147
        ([1, 1, 7, 1, 1], 4, 5, [[0, 1], [2, 3], [4]]),
        ([10, 5], 4, 5, [[0], [1]]),  # 10² = 100 just fits
        ([], 2, 5, []),
    ],
)
def test_split(lengths: list[int], rows: int, tokens: int, parts: list[list[int]]) -> None:
    assert split_rows(lengths, rows, tokens) == parts


def test_split_keeps_within_the_plan() -> None:
    generator = random.Random(4)
    for _ in range(500):
        rows, tokens = generator.randint(1, 8), generator.randint(1, 40)
        longest = max(length for length in range(200) if length * length <= rows * tokens * tokens)
        lengths = [generator.randint(1, longest) for _ in range(generator.randint(0, 20))]
        parts = split_rows(lengths, rows, tokens)
        assert list(chain.from_iterable(parts)) == list(range(len(lengths)))
        for part in parts:
            padded = max(lengths[i] for i in part)
            assert 1 <= len(part) <= rows
            assert len(part) * padded <= rows * tokens
            assert len(part) * padded * padded <= rows * tokens * tokens
        for part, following in pairwise(parts):  # no part could have taken the next row too
            more = len(part) + 1
            padded = max(lengths[i] for i in [*part, following[0]])
            assert more > rows or (padded > tokens and more * padded * padded > rows * tokens * tokens)
        with pytest.raises(
            TightfitError, match=f"a sample has {longest + 1} tokens, more than the planned micro-batch of {rows} × {tokens}"
        ) as caught:
            split_rows([*lengths, longest + 1], rows, tokens)
        assert f"--context {longest + 1}" in caught.value.hint
