"""Law 7, words, budgets, plans and texts: one clear line, a hint where one helps, an exit code, and nothing left behind."""

import json
import re

import pytest

RAM = ["--ram", "64GiB"]
LLAMA = "llama-2-7b"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", LLAMA, "--ram", "lots"], "`lots` is not a size"),
        (["plan", LLAMA, "--gpu", "6 GiBs"], "`6 GiBs` is not a size"),
        (["plan", LLAMA, "--disk", "-3GiB"], "`-3GiB` is not a size"),
        (["plan", LLAMA, "--ram", ""], "`` is not a size"),
        (["plan", LLAMA, "--ram", "0"], "no room"),
        (["run", LLAMA, "--ram", "1e9"], "`1e9` is not a size"),
        (["plan", "lama-2-7b"], "no model is called `lama-2-7b`"),
        (["plan", "nobody/nothing"], "`nobody/nothing` is not in the cache"),
        (["plan", LLAMA, "--task", "sing"], "no task is called `sing`"),
        (["plan", LLAMA, "--quality", "fine", *RAM], "no quality is called `fine`"),
        (["plan", LLAMA, *RAM, "--technique", "int9"], "did you mean `int8`"),
        (["plan", LLAMA, *RAM, "--technique", "int8:wher=x"], "did you mean `where`"),
        (["plan", LLAMA, *RAM, "--technique", "int8:where"], "`where` is not a setting"),
        (["plan", LLAMA, *RAM, "--technique", "int8:where=["], "is not a regular expression"),
        (["plan", "tightfit-demo", *RAM, "--technique", "int8:where=nowhere"], "found no linear layer"),
        (["plan", "tightfit-demo", *RAM, "--technique", "nf4:layout=flat"], "no layout `flat`"),
        (["plan", "tightfit-demo", *RAM, "--technique", "offload:slots=1"], "at least 2"),
        (["plan", "tightfit-demo", *RAM, "--technique", "offload:streamed=0,1"], "planner's to choose"),
        (["plan", "tightfit-demo", *RAM, "--technique", "int8", "--technique", "nf4"], "found no linear layer"),
        (["explain", "int9"], "did you mean `int8`"),
        (["bench", "nothing"], "no benchmark is called `nothing`"),
        (["eval", "tightfit-demo", "text", "--metric", "bleu"], "no metric is called `bleu`"),
        (["run"], "name a model, or a plan"),
        (["run", LLAMA, "--plan", "plan.json"], "not both"),
        (["run", LLAMA], "a shape without weights"),
        (["run", "tightfit-demo", *RAM, "--chat"], "has no chat template"),
        (["run", "tightfit-demo", *RAM, "--prompt", ""], "the prompt is empty"),
        (["run", "tightfit-demo", *RAM, "--stop", ""], "an empty stop text"),
        (["run", "tightfit-demo", *RAM, "--prompt", "word " * 2000], "the model has 1024 positions"),
        (["run", "tightfit-demo", *RAM, "--max-new-tokens", "2000"], "the model has 1024 positions"),
        (["plan", "gpt2", *RAM, "--context", "5000"], "more than the model's 1024 positions"),
        (["plan", "bert-base", *RAM], "does not write text"),
        (["plan", "tightfit-demo", *RAM, "--save", "nowhere/plan.json"], "cannot write `nowhere/plan.json`"),
        (["run", "tightfit-demo", *RAM, "--save-report", "/"], "cannot write `/`"),
        (["report", "/dev/null"], "is not a report"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_word_that_is_wrong(words, said, refused):
    assert said in refused(*words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "tightfit-demo", *RAM, "--technique", "nf4:double_quantization=maybe"], "is true or false, not `maybe`"),
        (["plan", "tightfit-demo", *RAM, "--technique", "recompute:every=x"], "is a number, not `x`"),
        (["plan", "tightfit-demo", *RAM, "--technique", "recompute:every=0"], "is at least 1, not 0"),
        (["report", "nowhere.json"], "cannot read `nowhere.json`"),
        (["report", "/"], "cannot read `/`"),
        (["run", "--plan", "nowhere.json"], "cannot read the plan `nowhere.json`"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_word_that_is_wrong_and_says_all(words, said, refused):
    """The line itself says what would be right."""
    assert said in refused(*words, hint=False)


@pytest.mark.parametrize(
    "words",
    [
        ["plam"],
        ["plan"],
        ["plan", LLAMA, "--frob"],
        ["plan", LLAMA, "--batch", "0"],
        ["plan", LLAMA, "--batch", "x"],
        ["run", LLAMA, "--top-p", "2"],
        ["run", LLAMA, "--temperature", "-1"],
        ["run", LLAMA, "--seed", "-1"],
        ["run", LLAMA, "--seed", "9" * 20],
        ["eval", LLAMA],
    ],
    ids=" ".join,
)
def test_what_the_command_line_does_not_take(words, refused):
    refused(*words, code=2)


@pytest.mark.parametrize("tier", ["ram", "gpu"])
def test_a_budget_below_the_largest_block(tier, refused):
    err = refused("plan", LLAMA, f"--{tier}", "200MiB", *([] if tier == "ram" else ["--ram", "64GiB"]))
    assert re.search(rf"error: `llama-2-7b` needs [\d.]+ [MG]iB on {tier} to write text.*; the budget is 200.0 MiB", err)
    assert re.search(r"^  weights [\d.]+ \wiB .*overhead", err, re.MULTILINE)
    assert f"hint: `--{tier} " in err


def test_an_absurd_workload(refused):
    assert "grows with the tokens" in refused("plan", "bloom-7.1b", *RAM, "--context", 10**6)
    assert "than can be counted" in refused("plan", "bloom-7.1b", *RAM, "--context", 10**9)


@pytest.mark.parametrize("text", ["", "{", "hello", "[]", "5", '{"format": 1}', '{"format": 99}'])
def test_a_plan_of_junk(text, refused, tmp_path):
    (tmp_path / "plan.json").write_text(text)
    refused("run", "--plan", tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"techniques": {"int9": {}}}, "no technique is called `int9`"),
        ({"techniques": {"int8": {"wher": "x"}}}, "no setting `wher`"),
        ({"techniques": {"offload": {"streamed": [99]}}}, "no block lies at 99"),
        ({"techniques": {"offload": {"streamed": "junk"}}}, "`offload:streamed`"),
        ({"techniques": {"int8": {"where": 5}}}, "`int8:where`"),
        ({"techniques": "junk"}, "not a plan"),
        ({"residency": ["ram"] * 3}, "places 3 blocks"),
        ({"residency": ["moon"] * 4}, "not a plan"),
        ({"model": "nowhere"}, "no model is called `nowhere`"),
        ({"budget": {"ram": 1 << 40, "gpu": 1 << 40}, "predicted": {"gpu": {"weights": 1}}}, "torch finds none here"),
        ({"workload": {"task": "tune", "tokens": 64}}, "the plan is for `tune`"),
        ({"workload": {"task": "sing"}}, "not a plan"),
        ({"budget": {"ram": 1 << 20}}, "its budget is 1.0 MiB"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_a_plan_that_cannot_be_carried_out(change, said, refused, model, tmp_path, streaming):
    values = json.loads(streaming(model()).read_text()) | change
    (tmp_path / "plan.json").write_text(json.dumps(values))
    assert said in refused("run", "--plan", tmp_path / "plan.json", "--prompt", "a b c")


def test_a_prompt_that_the_plan_did_not_foresee(refused, model, tmp_path, streaming):
    plan = streaming(model())
    assert "the plan allows 16" in refused("run", "--plan", plan, "--prompt", "word " * 17)


@pytest.mark.parametrize(
    ("data", "said", "hint"),
    [
        (b"", "holds no text", True),
        (b" \n" * 50, "holds no text", True),
        (b"\xff\xfe\x00" * 50, "is not UTF-8", True),
        (None, "cannot read", True),
    ],
)
def test_a_text_that_is_none(data, said, hint, refused, tmp_path):
    if data is not None:
        (tmp_path / "text").write_bytes(data)
    assert said in refused("eval", "tightfit-demo", tmp_path / "text", *RAM, hint=hint)


def test_a_text_with_nothing_to_predict(refused, model, tmp_path):
    (tmp_path / "text").write_text("word")
    assert "single token" in refused("eval", model(), tmp_path / "text", *RAM)
