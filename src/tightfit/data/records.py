"""Records: files and folders of examples, read and checked line by line. Knows no tokenizer."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tightfit.terms.errors import TightfitError

RecordKind = Literal["messages", "instruction", "completion", "text", "plain"]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Who may speak in `messages`, by the names that chat templates know."""

_FIELDS = {
    "messages": "`messages`",
    "instruction": "`instruction` and `output`",
    "completion": "`prompt` and `completion`",
    "text": "`text`",
}
_FORMS = "write one object a line with `messages`, `instruction` and `output`, `prompt` and `completion`, or `text`"
_COLUMNS = ("messages", "prompt", "completion", "instruction", "input", "output", "text")
_NAMED = 5  # lines that a message names before it says how many more there are


@dataclass(frozen=True)
class Records:
    """What a file holds, all of one kind, in its order.

    - `messages`: `{"messages": [{role, content}, …], "learn_from": n}`; answers before the message number `n` are not learned;
    - `instruction`: `{"instruction", "input", "output"}`, where `input` may be empty (Alpaca);
    - `completion`: `{"prompt", "completion"}`, both text (lists of messages become `messages`, as in TRL);
    - `text`: `{"text"}`, each a sample; `plain`: one `{"text"}`, which is cut into windows.

    `digest` is the sha256 of the file's bytes, or of the rows of a `datasets` folder.
    """

    items: list[dict[str, Any]]
    kind: RecordKind
    notes: tuple[str, ...] = ()
    digest: str = ""


def read_records(path: str | Path, bad_share: float = 0.0) -> Records:
    """The records of `.jsonl`, `.ndjson` or `.json` files, a folder that `datasets` saved, or any other file as one plain text.

    Blank lines do not count. Up to `bad_share` of the lines may be unusable: they are left out and named in `notes`.
    Raises `TightfitError` for more of them, for kinds that are mixed, and for what is missing, empty or not UTF-8.
    """
    path = Path(path)
    if not 0 <= bad_share <= 1:
        raise TightfitError(f"a bad share of {bad_share:g} is not a share", hint="give a number from 0 to 1, such as `--bad-share 0.1`")
    if path.is_dir():
        return _read_dataset(path, bad_share)
    raw = _read_bytes(path)
    text, digest = _decode(path, raw), hashlib.sha256(raw).hexdigest()
    if not text.strip():
        raise TightfitError(f"`{path}` is empty", hint="name a file with some examples")
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _gather(path, "line", _lines(text), _parse, bad_share, digest)
    if path.suffix.lower() == ".json":
        return _read_json(path, text, bad_share, digest)
    if "\0" in text:
        raise TightfitError(f"`{path}` is not a text: it holds bytes of zero", hint=f"name a text file, or {_FORMS} in a `.jsonl` file")
    return Records([{"text": text.replace("\r\n", "\n")}], "plain", (f"`{path.name}` is read as one long text",), digest)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise TightfitError(f"there is no `{path}`", hint="name a file or a `datasets` folder that is there") from error
    except OSError as error:
        raise TightfitError(f"cannot read `{path}`: {error.strerror}", hint="name a file that is yours to read") from error


def _decode(path: Path, raw: bytes) -> str:
    """UTF-8 with or without a byte order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        source = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        start = error.start + 3 * raw.startswith(b"\xef\xbb\xbf")  # the codec counts from behind the mark
        raise TightfitError(
            f"`{path}` is not UTF-8: line {raw.count(bytes([10]), 0, start) + 1}, byte {start} cannot be read",
            hint=f"convert it, for example with `iconv -f {source} -t utf-8`",
        ) from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers. Only a line feed ends one: JSON may hold Unicode's other separators."""
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error


def _read_json(path: Path, text: str, bad_share: float, digest: str) -> Records:
    """A list of objects, or one of them; files of lines are often called `.json` too."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):
            return _gather(path, "line", _lines(text), _parse, bad_share, digest)
        raise TightfitError(f"`{path}` is not JSON: {error}", hint="mend it, or write one object a line in a `.jsonl` file") from error
    if not isinstance(value, list | dict):
        raise TightfitError(f"`{path}` holds {_shape(value)}, not a list of objects", hint=_FORMS)
    entries = value if isinstance(value, list) else [value]
    return _gather(path, "record", enumerate(entries, start=1), lambda entry: entry, bad_share, digest)


def _read_dataset(path: Path, bad_share: float) -> Records:
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise TightfitError(
            f"`{path}` is a folder, but not one that `datasets` saved", hint="name a file, or a folder written by `save_to_disk`"
        )
    try:
        from datasets import Dataset, DatasetDict, load_from_disk
    except ImportError as error:
        raise TightfitError(f"`{path}` needs the library `datasets`", hint="`pip install datasets`") from error
    try:
        dataset: Dataset | DatasetDict = load_from_disk(str(path))
    except Exception as error:  # damaged folders fail in many ways: JSON, Arrow, missing files
        raise TightfitError(f"`{path}` cannot be read: {(str(error).splitlines() or [''])[0]}", hint="save the dataset again") from error
    if isinstance(dataset, DatasetDict):
        if "train" not in dataset:
            names = ", ".join(f"`{name}`" for name in dataset)
            raise TightfitError(f"`{path}` has no split `train`, but {names}", hint=f"name one: `{path / next(iter(dataset), 'SPLIT')}`")
        dataset = dataset["train"]
    known = [name for name in dataset.column_names if name in _COLUMNS]
    seen = hashlib.sha256()
    rows = _digested(dataset.select_columns(known) if known else dataset, seen)
    found = _gather(path, "row", enumerate(rows, start=1), lambda row: row, bad_share, "")
    return Records(found.items, found.kind, found.notes, seen.hexdigest())


def _digested(rows: Iterable[Any], seen: Any) -> Iterator[Any]:
    for row in rows:
        seen.update(json.dumps(row, default=str).encode())
        yield row


def _gather(
    path: Path, unit: str, entries: Iterable[tuple[int, Any]], parse: Callable[[Any], Any], bad_share: float, digest: str
) -> Records:
    """All usable entries, if enough of them are and all are of one kind. `unit` is what an entry is called: `line`, `record` or `row`."""
    items: list[dict[str, Any]] = []
    faults: list[str] = []
    first: tuple[int, RecordKind] | None = None
    for number, entry in entries:
        try:
            kind, item = _record(parse(entry))
        except ValueError as error:
            faults.append(f"{unit} {number}: {error}")
            continue
        first = first or (number, kind)
        if kind != first[1]:
            raise TightfitError(
                f"`{path}` mixes kinds: {unit} {first[0]} has {_FIELDS[first[1]]}, {unit} {number} has {_FIELDS[kind]}",
                hint="keep one kind in a file",
            )
        items.append(item)
    _check_share(path, unit, faults, len(items) + len(faults), bad_share)
    if first is None:
        raise TightfitError(f"`{path}` holds no record", hint=_FORMS)
    left_out = (f"left out of `{path.name}`: {_counted(faults, len(items) + len(faults), unit)}",) if faults else ()
    return Records(items, first[1], left_out, digest)


def _check_share(path: Path, unit: str, faults: list[str], count: int, bad_share: float) -> None:
    if faults and len(faults) == count:
        raise TightfitError(f"`{path}` holds nothing usable: {_counted(faults, count, unit)}", hint=_FORMS)
    if len(faults) > bad_share * count:
        enough = math.ceil(len(faults) / count * 100) / 100
        raise TightfitError(
            f"`{path}`: {_counted(faults, count, unit)}", hint=f"mend them, or leave them out with `--bad-share {max(enough, 0.1):g}`"
        )


def _counted(faults: list[str], count: int, unit: str) -> str:
    """How many, and which: `2 of 40 lines cannot be used: line 7: not JSON (…); line 9: …`."""
    more = [f"and {len(faults) - _NAMED} more"] if len(faults) > _NAMED else []
    return f"{len(faults)} of {count} {unit}{'s' * (count != 1)} cannot be used: " + "; ".join(faults[:_NAMED] + more)


def _record(entry: Any) -> tuple[RecordKind, dict[str, Any]]:
    """The kind of an entry and its known fields, checked. Raises `ValueError` with the reason that makes it unusable."""
    if not isinstance(entry, dict):
        raise ValueError(f"{_shape(entry)}, not an object")
    given = {name: value for name, value in entry.items() if value is not None}
    if "messages" in given:
        return "messages", {"messages": _messages(given["messages"], "messages", answered=True), "learn_from": 0}
    if "prompt" in given and "completion" in given:
        return _completion(given["prompt"], given["completion"])
    if "instruction" in given:
        asked = given.get("input", "")
        return "instruction", {
            "instruction": _filled(given["instruction"], "`instruction`"),
            "input": _filled(asked, "`input`") if asked != "" else "",
            "output": _filled(_present(given, "output"), "`output`"),
        }
    if "text" in given:
        return "text", {"text": _filled(given["text"], "`text`")}
    for name, missing in (("prompt", "completion"), ("completion", "prompt")):
        if name in given:
            _present(given, missing)
    null = next((name for name in _COLUMNS if name in entry), None)
    if null:
        raise ValueError(f"`{null}` is null")
    names = ", ".join(f"`{name}`" for name in list(entry)[:_NAMED])
    raise ValueError(f"no known field (it has {names})" if names else "no known field (it is empty)")


def _completion(prompt: Any, completion: Any) -> tuple[RecordKind, dict[str, Any]]:
    if isinstance(prompt, list) and isinstance(completion, list):
        asked, answer = _messages(prompt, "prompt", answered=False), _messages(completion, "completion", answered=True)
        return "messages", {"messages": asked + answer, "learn_from": len(asked)}
    if isinstance(prompt, list):
        raise ValueError("`prompt` is a list of messages, `completion` is not")
    return "completion", {"prompt": _filled(prompt, "`prompt`"), "completion": _filled(completion, "`completion`")}


def _messages(value: Any, name: str, answered: bool) -> list[dict[str, Any]]:
    """A conversation in which every turn says something, and which the assistant `answered` if it must have."""
    if not isinstance(value, list):
        raise ValueError(f"`{name}` is {_shape(value)}, not a list")
    if not value:
        raise ValueError(f"`{name}` is empty")
    for number, message in enumerate(value, start=1):
        place = f"message {number} of `{name}`"
        if not isinstance(message, dict):
            raise ValueError(f"{place} is {_shape(message)}, not an object")
        role = message.get("role")
        if not isinstance(role, str):
            raise ValueError(f"{place} has no `role`" if role is None else f"the role in {place} is {_shape(role)}, not a text")
        if role not in ROLES:
            raise ValueError(f"{place} has the unknown role `{role}`")
        if not (role == "assistant" and message.get("tool_calls") and not message.get("content")):  # a call says nothing else
            _filled(message.get("content"), f"the content of {place}")
    if answered and not any(message["role"] == "assistant" for message in value):
        raise ValueError(f"`{name}` has no assistant turn")
    return value


def _present(given: dict[str, Any], name: str) -> Any:
    if name not in given:
        raise ValueError(f"`{name}` is missing")
    return given[name]


def _filled(value: Any, name: str) -> str:
    """`value`, which must be a text that says something and that UTF-8 can hold."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_shape(value)}, not a text")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a character (a lone surrogate)") from error
    return value


def _shape(value: Any) -> str:
    """What JSON calls it."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), f"a `{type(value).__name__}`")
