"""Law 7: bad input gets one clear line, a hint where one helps, an exit code, and leaves nothing behind."""

import json
import os
import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tightfit.planner.residency import resident
from tightfit.terms.budget import Budget
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload

RAM = ["--ram", "64GiB"]
UP = "model.layers.1.mlp.up_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def files_in(*folders: Path) -> dict[Path, int]:
    """Every file below the folders with its size."""
    return {file: file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def refused(tightfit_says, tmp_path, monkeypatch) -> Callable[..., str]:
    """Call the command line with bad input: it must refuse as the law says. Gives back what it said on stderr."""
    spill = tmp_path / "spill"
    spill.mkdir()
    monkeypatch.setenv("TIGHTFIT_SPILL", str(spill))
    monkeypatch.chdir(spill)

    def call(*arguments: object, code: int = 1, hint: bool = True, changed: dict[Path, int] | None = None) -> str:
        expected = files_in(tmp_path) | (changed or {})
        said = tightfit_says(*arguments)
        assert said.code == code, said
        assert re.findall(r"^error: .+", said.err, re.MULTILINE) and said.err.count("error:") == 1, said.err
        assert "Traceback" not in said.err and "unexpected" not in said.err
        assert ("\n\nhint: " in said.err) == hint, said.err
        assert said.out == ""
        assert files_in(tmp_path) == expected
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("tightfit")]
        return said.err

    return call


@pytest.fixture
def model(saved, tmp_path) -> Callable[..., Path]:
    """A saved family with some of its tensors or config values changed; None takes one away."""

    def make(family: str = "llama", tensors: dict[str, Any] | None = None, config: dict[str, Any] | bytes | None = None) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        kept = load_file(saved(family) / "model.safetensors") | (tensors or {})
        save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, folder / "model.safetensors", {"format": "pt"})
        values = config if isinstance(config, bytes) else json.dumps(json.loads((saved(family) / "config.json").read_text()) | (config or {})).encode()
        (folder / "config.json").write_bytes(values)
        return folder

    return make


def runs(folder: object) -> list[object]:
    return ["run", folder, "--prompt", "one two three", "--max-new-tokens", 2, *RAM]


# ---- checkpoints


def test_a_missing_shard(refused, saved, tmp_path):
    from families import make

    make("llama").save_pretrained(tmp_path / "m", max_shard_size="200KB")
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    shards[1].unlink()
    for words in (["plan", tmp_path / "m", *RAM], runs(tmp_path / "m")):
        assert shards[1].name in refused(*words)


@pytest.mark.parametrize("kept", [0, 5, 100, -1000])
def test_a_truncated_shard(kept, refused, model):
    folder = model()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:kept])
    assert "model.safetensors" in refused("plan", folder, *RAM)
    refused(*runs(folder))


def test_an_index_that_names_a_missing_tensor(refused, model):
    folder = model()
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys([*names, "model.layers.9.ghost"], "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.layers.9.ghost" in refused("plan", folder, *RAM)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 1}'])
def test_an_index_of_junk(text, refused, model):
    folder = model()
    (folder / "model.safetensors.index.json").write_text(text)
    assert "index" in refused("plan", folder, *RAM)


@pytest.mark.parametrize(
    ("family", "tensors", "said"),
    [
        ("llama", {UP: None}, f"`{UP}` is not in the checkpoint"),
        ("llama", {UP: torch.zeros(5, 64)}, f"`{UP}` has shape [5, 64], the config says [160, 64]"),
        ("llama", {UP: torch.zeros(160, 64, dtype=torch.int8)}, f"`{UP}` is stored as int8"),
        ("llama", {UP: torch.zeros(160, 64, dtype=torch.float8_e4m3fn)}, f"`{UP}` is stored as float8_e4m3fn"),
        ("mixtral", {EXPERT: None}, "the 7 parts of `model.layers.1.mlp.experts.gate_up_proj` have"),
        ("mixtral", {EXPERT: torch.zeros(64, 160, dtype=torch.bfloat16)}, "parts of `model.layers.1.mlp.experts.gate_up_proj` have unlike shapes"),
        ("mixtral", {EXPERT: torch.zeros(160, 64, dtype=torch.int8)}, "`model.layers.1.mlp.experts.gate_up_proj` is stored as int8"),
    ],
    ids=["missing", "shape", "int8", "float8", "expert missing", "expert shape", "expert int8"],
)
def test_a_tensor_that_disagrees_with_the_config(family, tensors, said, refused, model):
    folder = model(family, tensors)
    assert said in refused("plan", folder, *RAM)
    assert said in refused(*runs(folder))


def test_many_faults_are_told_in_one_line_and_a_short_list(refused, model):
    err = refused("plan", model(config={"hidden_size": 128}), *RAM)
    assert "(and 38 more)" in err and len(err.splitlines()) < 14


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("technique", [[], ["--technique", "int8"], ["--technique", "nf4"]])
def test_weights_that_are_not_numbers(value, technique, refused, model):
    weight = torch.zeros(160, 64)
    weight[3, 5] = value
    assert f"`{UP}` holds NaN or infinite values" in refused(*runs(model(tensors={UP: weight})), *technique)


def test_streamed_weights_that_are_not_numbers(refused, model, tmp_path):
    """They never pass through Python, so it is the model's output that tells."""
    folder = model(tensors={UP: torch.full((160, 64), float("nan"))})
    assert "not finite" in refused("run", "--plan", streaming(folder, tmp_path / "plan.json"), "--prompt", "a b c")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "names no architecture"),
        (b"{}", "names no architecture"),
        ({"model_type": 5}, "names no architecture"),
        ({"model_type": "frobnicator"}, "the architecture `frobnicator` is unknown"),
        ({"model_type": "lama"}, "did you mean `llama`"),
        ({"vocab_size": -5}, "no model can be made"),
        ({"hidden_act": "frob"}, "no model can be made"),
        ({"num_attention_heads": 0}, "not a valid `llama` config"),
        ({"hidden_size": "many"}, "`hidden_size`"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized (`gptq`)"),
        ({"quantization_config": 5}, "already quantized"),
        ({"architectures": ["BertForMaskedLM"]}, "`BertForMaskedLM` does not write text"),
    ],
)
def test_a_config_that_is_no_config(config, said, refused, model):
    hinted = "not a valid" not in said and "hidden_size" not in said
    assert said.replace("`hidden_size`", "hidden_size") in refused("plan", model(config=config), *RAM, hint=hinted)


def test_a_folder_without_config_or_weights(refused, tmp_path, model):
    (tmp_path / "bare").mkdir()
    assert "has no `config.json`" in refused("plan", tmp_path / "bare", *RAM)
    folder = model()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "`pytorch_model.bin` is a pickle" in refused("plan", folder, *RAM)
    save_file({}, folder / "model.safetensors")
    assert "no tensor" in refused(*runs(folder))


@pytest.mark.parametrize(("name", "text", "hint"), [("tokenizer.json", "{", False), ("generation_config.json", "{", True), ("generation_config.json", "[]", True)])
def test_a_damaged_file_beside_the_weights(name, text, hint, refused, model):
    folder = model()
    (folder / name).write_text(text)
    refused(*runs(folder), hint=hint)


# ---- names, sizes, numbers

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
        (["plan", "tightfit-demo", *RAM, "--technique", "offload"], "names no block"),
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
    [["plam"], ["plan"], ["plan", LLAMA, "--frob"], ["plan", LLAMA, "--batch", "0"], ["plan", LLAMA, "--batch", "x"], ["run", LLAMA, "--top-p", "2"]]
    + [["run", LLAMA, "--temperature", "-1"], ["run", LLAMA, "--seed", "-1"], ["run", LLAMA, "--seed", "9" * 20], ["eval", LLAMA]],
    ids=" ".join,
)
def test_what_the_command_line_does_not_take(words, refused):
    refused(*words, code=2, hint=False)


# ---- budgets


@pytest.mark.parametrize("tier", ["ram", "gpu"])
def test_a_budget_below_the_largest_block(tier, refused):
    err = refused("plan", LLAMA, f"--{tier}", "200MiB", *([] if tier == "ram" else ["--ram", "64GiB"]))
    assert re.search(rf"error: `llama-2-7b` needs [\d.]+ [MG]iB on {tier} to write text.*; the budget is 200.0 MiB", err)
    assert re.search(r"^  weights [\d.]+ \wiB .*overhead", err, re.MULTILINE)
    assert f"hint: `--{tier} " in err


def test_an_absurd_workload(refused):
    assert "grows with the tokens" in refused("plan", LLAMA, *RAM, "--context", 10**9)


# ---- plans and reports


def streaming(folder: object, file: Path, room: int = 1, **techniques: dict[str, object]) -> Path:
    """A plan by hand for a model of four blocks, all but `room` of which stream; saved to `file`."""
    stays = resident(4, room)
    homes = tuple("ram" if position in stays else "disk" for position in range(4))
    settings = techniques | {"offload": {"streamed": [position for position in range(4) if position not in stays]}}
    plan = Plan(str(folder), Workload("generate", 1, 16, 4), Budget(ram=1 << 40), "exact", settings, homes, {"ram": {"weights": 10**6}}, {}, {})
    file.write_text(json.dumps(plan.to_json()))
    return file


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
def test_a_plan_that_cannot_be_carried_out(change, said, refused, model, tmp_path):
    values = json.loads(streaming(model(), tmp_path / "plan.json").read_text()) | change
    (tmp_path / "plan.json").write_text(json.dumps(values))
    assert said in refused("run", "--plan", tmp_path / "plan.json", "--prompt", "a b c")


def test_a_prompt_that_the_plan_did_not_foresee(refused, model, tmp_path):
    plan = streaming(model(), tmp_path / "plan.json")
    assert "the plan allows 16" in refused("run", "--plan", plan, "--prompt", "word " * 17)


# ---- disks


@pytest.mark.parametrize("technique", ["int8", "nf4"])
def test_a_full_disk(technique, refused, saved, tmp_path, monkeypatch):
    """The spill folder is a file system of 64 KiB; the blocks take more."""
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("this user cannot mount a small file system")
    try:
        monkeypatch.setenv("TIGHTFIT_SPILL", str(small))
        plan = streaming(saved("llama"), tmp_path / "plan.json", **{technique: {}})
        err = refused("run", "--plan", plan, "--prompt", "a b c")
        assert f"`{small}` cannot be written: no space left" in err
        assert list(small.iterdir()) == []
        assert os.statvfs(small).f_bavail * os.statvfs(small).f_frsize >= 60 * 1024, "the space was given back"
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("wrong", ["missing", "file"])
def test_a_spill_folder_that_is_none(wrong, refused, saved, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TIGHTFIT_SPILL", str(tmp_path / wrong))
    plan = streaming(saved("llama"), tmp_path / "plan.json", int8={})
    assert "written" in refused("run", "--plan", plan, "--prompt", "a b c")
    if wrong == "missing":
        assert "TIGHTFIT_SPILL" in refused("plan", LLAMA)


def test_a_checkpoint_that_shrinks_while_it_streams(refused, model, tmp_path, monkeypatch):
    """Cut after the headers were read: the stream finds the end too early."""
    from tightfit import verbs

    folder = model()
    plan = streaming(folder, tmp_path / "plan.json")
    file = folder / "model.safetensors"
    describe, size = verbs.describe, file.stat().st_size
    monkeypatch.setattr(verbs, "describe", lambda *words, **more: (describe(*words, **more), os.truncate(file, size // 3))[0])
    assert "model.safetensors" in refused("run", "--plan", plan, "--prompt", "a b c", changed={file: size // 3})


# ---- texts


@pytest.mark.parametrize(
    ("data", "said", "hint"),
    [(b"", "holds no text", False), (b" \n" * 50, "holds no text", False), (b"\xff\xfe\x00" * 50, "is not UTF-8", True), (None, "cannot read", False)],
)
def test_a_text_that_is_none(data, said, hint, refused, tmp_path):
    if data is not None:
        (tmp_path / "text").write_bytes(data)
    assert said in refused("eval", "tightfit-demo", tmp_path / "text", *RAM, hint=hint)


def test_a_text_with_nothing_to_predict(refused, model, tmp_path):
    (tmp_path / "text").write_text("word")
    assert "single token" in refused("eval", model(), tmp_path / "text", *RAM, hint=False)
