"""Law 7, checkpoints and disks: one clear line, a hint where one helps, an exit code, and nothing left behind."""

import json
import os
import subprocess

import pytest
import torch
from families import make
from safetensors.torch import load_file, save_file

RAM = ["--ram", "64GiB"]
UP = "model.layers.1.mlp.up_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


def runs(folder: object) -> list[object]:
    return ["run", folder, "--prompt", "one two three", "--max-new-tokens", 2, *RAM]


def test_a_missing_shard(refused, saved, tmp_path):
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
        (
            "mixtral",
            {EXPERT: torch.zeros(64, 160, dtype=torch.bfloat16)},
            "parts of `model.layers.1.mlp.experts.gate_up_proj` have unlike shapes",
        ),
        ("mixtral", {EXPERT: torch.zeros(160, 64, dtype=torch.int8)}, "`model.layers.1.mlp.experts.gate_up_proj` is stored as int8"),
    ],
    ids=["missing", "shape", "int8", "float8", "expert missing", "expert shape", "expert int8"],
)
def test_a_tensor_that_disagrees_with_the_config(family, tensors, said, refused, model):
    assert said in refused("plan", model(family, tensors), *RAM)


def test_many_faults_are_told_in_one_line_and_a_short_list(refused, model):
    err = refused("plan", model(config={"hidden_size": 128}), *RAM)
    assert "(and 38 more)" in err and len(err.splitlines()) < 14


@pytest.mark.parametrize(("value", "technique"), [("nan", ""), ("inf", ""), ("-inf", "int8"), ("nan", "nf4")])
def test_weights_that_are_not_numbers(value, technique, refused, model):
    weight = torch.zeros(160, 64)
    weight[3, 5] = float(value)
    assert f"`{UP}` holds NaN or infinite values" in refused(
        *runs(model(tensors={UP: weight})), *(["--technique", technique] if technique else [])
    )


def test_streamed_weights_that_are_not_numbers(refused, model, tmp_path, streaming):
    """They never pass through Python, so it is the model's output that tells."""
    folder = model(tensors={UP: torch.full((160, 64), float("nan"))})
    assert "not finite" in refused("run", "--plan", streaming(folder), "--prompt", "a b c")


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


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [("tokenizer.json", "{", False), ("generation_config.json", "{", True), ("generation_config.json", "[]", True)],
)
def test_a_damaged_file_beside_the_weights(name, text, hint, refused, model):
    folder = model()
    (folder / name).write_text(text)
    refused(*runs(folder), hint=hint)


@pytest.mark.parametrize("technique", ["int8", "nf4"])
def test_a_full_disk(technique, refused, saved, tmp_path, monkeypatch, streaming):
    """The spill folder is a file system of 64 KiB; the blocks take more."""
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("this user cannot mount a small file system")
    try:
        monkeypatch.setenv("TIGHTFIT_SPILL", str(small))
        monkeypatch.setattr("tightfit.terms.disk.IN_RAM", frozenset())  # else refused before it is full
        plan = streaming(saved("llama"), **{technique: {}})
        err = refused("run", "--plan", plan, "--prompt", "a b c")
        assert f"`{small}` cannot be written: no space left" in err
        assert list(small.iterdir()) == []
        assert os.statvfs(small).f_bavail * os.statvfs(small).f_frsize >= 60 * 1024, "the space was given back"
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("wrong", ["missing", "file"])
def test_a_spill_folder_that_is_none(wrong, refused, saved, tmp_path, monkeypatch, streaming):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TIGHTFIT_SPILL", str(tmp_path / wrong))
    plan = streaming(saved("llama"), int8={})
    assert "written" in refused("run", "--plan", plan, "--prompt", "a b c")
    if wrong == "missing":
        assert "TIGHTFIT_SPILL" in refused("plan", "llama-2-7b")


def test_a_checkpoint_that_shrinks_while_it_streams(refused, model, tmp_path, monkeypatch, streaming):
    """Cut after the headers were read: the stream finds the end too early."""
    from tightfit import verbs

    folder = model()
    plan = streaming(folder)
    file = folder / "model.safetensors"
    describe, size = verbs.describe, file.stat().st_size
    monkeypatch.setattr(verbs, "describe", lambda *words, **more: (describe(*words, **more), os.truncate(file, size // 3))[0])
    assert "model.safetensors" in refused("run", "--plan", plan, "--prompt", "a b c", changed={file: size // 3})
