"""Records: what files and folders are read as, and what is said of bad ones."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tightfit.data.records import read_records
from tightfit.terms.errors import TightfitError

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(folder: Path, name: str, *lines: Any, end: str = "\n") -> Path:
    """A file of lines: text as it is, anything else as JSON."""
    file = folder / name
    file.write_bytes(end.join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode())
    return file


def refused(path: Path, bad_share: float = 0.0) -> tuple[str, str]:
    with pytest.raises(TightfitError) as caught:
        read_records(path, bad_share)
    assert "\n" not in str(caught.value) and caught.value.hint
    return str(caught.value).replace(str(path), "FILE"), caught.value.hint.replace(str(path), "FILE")


@pytest.mark.parametrize(
    ("line", "kind", "item"),
    [
        ({"messages": HI, "id": 3}, "messages", {"messages": HI, "learn_from": 0}),
        (
            {"instruction": "add", "input": "1 1", "output": "2", "text": "add 1 1 2"},
            "instruction",
            {"instruction": "add", "input": "1 1", "output": "2"},
        ),
        ({"instruction": "add", "output": "2"}, "instruction", {"instruction": "add", "input": "", "output": "2"}),
        ({"instruction": "add", "input": None, "output": "2"}, "instruction", {"instruction": "add", "input": "", "output": "2"}),
        ({"prompt": "a", "completion": " b"}, "completion", {"prompt": "a", "completion": " b"}),
        ({"prompt": HI + HI[:1], "completion": HI[1:]}, "messages", {"messages": HI + HI, "learn_from": 3}),
        ({"prompt": "a", "messages": HI}, "messages", {"messages": HI, "learn_from": 0}),
        ({"messages": None, "text": "a\u2028b"}, "text", {"text": "a\u2028b"}),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.JSON", "x.ndjson", "list.json"])
def test_known_forms(tmp_path: Path, name: str, line: dict[str, Any], kind: str, item: dict[str, Any]) -> None:
    file = write(tmp_path, name, [line, line] if name == "list.json" else json.dumps(line, ensure_ascii=False))
    records = read_records(file)
    assert (records.kind, records.notes) == (kind, ())
    assert records.items == [item] * (2 if name == "list.json" else 1)
    assert records.digest == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_call_needs_no_content(tmp_path: Path) -> None:
    chat = [HI[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "3"}, HI[1]]
    assert read_records(write(tmp_path, "x.jsonl", {"messages": chat})).items[0]["messages"] == chat


def test_marks_blank_lines_and_carriage_returns_do_not_count(tmp_path: Path) -> None:
    file = write(tmp_path, "x.jsonl", "\ufeff" + '{"text": "a"}', "", "  ", {"text": "b"}, "", end="\r\n")
    assert read_records(file).items == [{"text": "a"}, {"text": "b"}]
    assert [item["text"] for item in read_records(write(tmp_path, "x.json", "\ufeff" + '[{"text": "a"}]')).items] == ["a"]
    assert read_records(write(tmp_path, "x.txt", "\ufeffa", "b", "", end="\r\n")).items == [{"text": "a\nb\n"}]


def test_lines_may_be_called_json(tmp_path: Path) -> None:
    assert len(read_records(write(tmp_path, "x.json", {"text": "a"}, {"text": "b"})).items) == 2


@pytest.mark.parametrize("name", ["x.txt", "x.md", "x", "x.py"])
def test_anything_else_is_one_text(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name, "once", "", "twice")
    records = read_records(file)
    assert (records.kind, records.items) == ("plain", [{"text": "once\n\ntwice"}])
    assert records.notes == (f"`{name}` is read as one long text",)
    assert records.digest == hashlib.sha256(b"once\n\ntwice").hexdigest()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{nope", "not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ("[" * 100_000, "not JSON (maximum recursion depth exceeded"),
        ("[1]", "a list, not an object"),
        ('"a"', "a text, not an object"),
        ("null", "null, not an object"),
        ("true", "a truth value, not an object"),
        ("1.5", "a number, not an object"),
        ("{}", "no known field (it is empty)"),
        ({"conversations": [], "id": 1}, "no known field (it has `conversations`, `id`)"),
        ({"text": None}, "`text` is null"),
        ({"text": 3}, "`text` is a number, not a text"),
        ({"text": " \n"}, "`text` is empty"),
        ('{"text": "a\\ud800"}', "`text` holds half a character (a lone surrogate)"),
        ({"instruction": "a"}, "`output` is missing"),
        ({"instruction": "a", "output": ""}, "`output` is empty"),
        ({"instruction": [], "output": "b"}, "`instruction` is a list, not a text"),
        ({"instruction": "a", "input": 3, "output": "b"}, "`input` is a number, not a text"),
        ({"prompt": "a"}, "`completion` is missing"),
        ({"completion": "a", "prompt": None}, "`prompt` is missing"),
        ({"prompt": "a", "completion": HI}, "`completion` is a list, not a text"),
        ({"prompt": HI, "completion": "a"}, "`prompt` is a list of messages, `completion` is not"),
        ({"prompt": HI, "completion": HI[:1]}, "`completion` has no assistant turn"),
        ({"prompt": [], "completion": HI}, "`prompt` is empty"),
        ({"messages": "hi"}, "`messages` is a text, not a list"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": HI[:1]}, "`messages` has no assistant turn"),
        ({"messages": ["hi"]}, "message 1 of `messages` is a text, not an object"),
        ({"messages": [{"from": "human", "value": "hi"}]}, "message 1 of `messages` has no `role`"),
        ({"messages": [*HI, {"role": ["user"], "content": "a"}]}, "the role in message 3 of `messages` is a list, not a text"),
        ({"messages": [{"role": "human", "content": "hi"}, HI[1]]}, "message 1 of `messages` has the unknown role `human`"),
        ({"messages": [HI[0], {"role": "assistant", "content": ""}]}, "the content of message 2 of `messages` is empty"),
        ({"messages": [HI[0], {"role": "assistant"}]}, "the content of message 2 of `messages` is null, not a text"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "the content of message 1 of `messages` is a list, not a text"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: Any, reason: str) -> None:
    good = [{"text": "a"}] * 8
    file = write(tmp_path, "x.jsonl", *good, "", line, {"text": "z"})
    message, hint = refused(file, 0.0999)
    assert message.startswith(f"`FILE`: 1 of 10 lines cannot be used: line 10: {reason}")
    assert hint == "mend them, or leave them out with `--bad-share 0.1`"
    records = read_records(file, 0.1)
    assert records.items == [*good, {"text": "z"}]
    assert len(records.notes) == 1
    assert records.notes[0].startswith(f"left out of `x.jsonl`: 1 of 10 lines cannot be used: line 10: {reason}")
    assert refused(write(tmp_path, "x.jsonl", line), 1.0)[0].startswith(
        f"`FILE` holds nothing usable: 1 of 1 line cannot be used: line 1: {reason}"
    )


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    file = write(tmp_path, "x.jsonl", *["1", {"text": "a"}] * 17)
    named = "; ".join(f"line {number}: a number, not an object" for number in (1, 3, 5, 7, 9))
    assert refused(file, 0.49) == (
        f"`FILE`: 17 of 34 lines cannot be used: {named}; and 12 more",
        "mend them, or leave them out with `--bad-share 0.5`",
    )
    assert read_records(file, 0.5).notes == (f"left out of `x.jsonl`: 17 of 34 lines cannot be used: {named}; and 12 more",)
    assert refused(write(tmp_path, "x.json", [{"text": "a"}, 1, {"text": "b"}]))[0] == (
        "`FILE`: 1 of 3 records cannot be used: record 2: a number, not an object"
    )


def test_kinds_are_not_mixed(tmp_path: Path) -> None:
    file = write(tmp_path, "x.jsonl", "nope", {"text": "a"}, {"text": "b"}, "", {"messages": HI}, {"instruction": "a", "output": "b"})
    assert refused(file, 0.5) == ("`FILE` mixes kinds: line 2 has `text`, line 5 has `messages`", "keep one kind in a file")
    both = write(tmp_path, "y.jsonl", {"messages": HI}, {"prompt": HI[:1], "completion": HI[1:]})
    assert [item["learn_from"] for item in read_records(both).items] == [0, 1]  # both are conversations


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("x.jsonl", b"", "`FILE` is empty", "name a file with some examples"),
        ("x.jsonl", b"\n \r\n", "`FILE` is empty", "name a file"),
        ("x.txt", b"\xef\xbb\xbf \n", "`FILE` is empty", "name a file"),
        ("x.json", b"[]", "`FILE` holds no record", "write one object a line with `messages`"),
        ("x.json", b"3", "`FILE` holds a number, not a list of objects", "write one object a line"),
        ("x.json", b'[{"text": "a"},\n}', "`FILE` is not JSON: Expecting value: line 2 column 1 (char 16)", "mend it"),
        ("x.json", b'{"data": []}', "`FILE` holds nothing usable: 1 of 1 record cannot be used: record 1: no known field", "write one"),
        (
            "x.jsonl",
            b'{"text": "a"}\n{"text": "\xe9"}',
            "`FILE` is not UTF-8: line 2, byte 24 cannot be read",
            "`iconv -f latin1 -t utf-8`",
        ),
        ("x.txt", b"\xef\xbb\xbfa\xff", "`FILE` is not UTF-8: line 1, byte 4 cannot be read", "`iconv -f latin1 -t utf-8`"),
        ("x.txt", "a".encode("utf-16"), "`FILE` is not UTF-8: line 1, byte 0 cannot be read", "`iconv -f utf-16 -t utf-8`"),
        ("x.npy", b"a\0b", "`FILE` is not a text: it holds bytes of zero", "name a text file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str, hint: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    said = refused(file)
    assert said[0].startswith(message)
    assert hint in said[1]


def test_bad_places(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.jsonl")[0] == "there is no `FILE`"
    assert refused(write(tmp_path, "file", "a") / "x.jsonl")[0] == "cannot read `FILE`: Not a directory"
    assert refused(tmp_path)[0] == "`FILE` is a folder, but not one that `datasets` saved"
    for share in (-0.1, 1.5, float("nan")):
        assert "is not a share" in refused(tmp_path / "file", share)[0]


@pytest.fixture(scope="module")
def saved_datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("datasets")
    rows = datasets.Dataset.from_list([{"messages": HI, "score": 0.5}, {"messages": HI + HI, "score": 1.0}])
    rows.save_to_disk(str(root / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(root / "splits"))
    datasets.DatasetDict({"test": rows}).save_to_disk(str(root / "no_train"))
    datasets.Dataset.from_list([{"text": "a"}, {"text": None}, {"text": "c"}]).save_to_disk(str(root / "holes"))
    datasets.Dataset.from_list([{"number": 1}]).save_to_disk(str(root / "numbers"))
    return root


def test_datasets_folders(saved_datasets: Path) -> None:
    records = read_records(saved_datasets / "one")
    assert records.kind == "messages"
    assert [item["messages"] for item in records.items] == [HI, HI + HI]
    train, test = read_records(saved_datasets / "splits"), read_records(saved_datasets / "splits" / "test")
    assert (train.items, train.digest) == (records.items, records.digest)
    assert test.items == records.items[1:]
    assert test.digest != train.digest and len(test.digest) == 64


def test_bad_datasets_folders(saved_datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(saved_datasets / "no_train") == ("`FILE` has no split `train`, but `test`", "name one: `FILE/test`")
    assert refused(saved_datasets / "holes")[0] == "`FILE`: 1 of 3 rows cannot be used: row 2: `text` is null"
    assert read_records(saved_datasets / "holes", 0.4).items == [{"text": "a"}, {"text": "c"}]
    assert "row 1: no known field (it has `number`)" in refused(saved_datasets / "numbers")[0]
    write(tmp_path, "state.json", "{")
    assert refused(tmp_path)[0].startswith("`FILE` cannot be read: ")
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not there
    assert refused(saved_datasets / "one") == ("`FILE` needs the library `datasets`", "`pip install datasets`")
