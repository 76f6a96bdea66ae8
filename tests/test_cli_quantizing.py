"""The command line's `quantize`: what it says, what it leaves behind, and its one clear line for every fault."""

import json

import pytest
import torch


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "some.txt"
    file.write_text("The sea was calm that morning, and the ship lay still. " * 60)
    return file


@pytest.fixture
def quantized(tightfit_says, text, tmp_path):
    def call(*more):
        small = ("--context", 64, "--samples", 4, "--ram", "4GiB")
        return tightfit_says("quantize", "tightfit-demo", text, "-o", tmp_path / "small", *small, *more)

    return call


def test_the_demo_model_in_three_bits_runs_and_is_scored(quantized, tightfit_says, text, tmp_path):
    said = quantized("--bits", 3, "--save-report", tmp_path / "report.json")
    assert said.code == 0, said.err
    assert "84 layers to 3.42 bits a weight with lean" in said.err
    assert str(tmp_path / "small") in said.out and "planned" in said.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["peak_bytes"] < report["plan"]["budget"]["ram"] and report["warnings"] == []
    files = sorted(file.name for file in (tmp_path / "small").iterdir())
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json"} <= set(files)
    assert sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors")) == pytest.approx(
        report["plan"]["output_bytes"], rel=0.02
    )
    ran = tightfit_says("run", tmp_path / "small", "--ram", "2GiB", "--prompt", "The sea", "--max-new-tokens", 4, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["tokens"] == 4
    scores = [
        json.loads(tightfit_says("eval", model, text, "--ram", "2GiB", "--json").out)["perplexity"]
        for model in ("tightfit-demo", tmp_path / "small")
    ]
    assert scores[0] != scores[1] < 1.5 * scores[0]


def test_after_the_import_plain_transformers_loads_it(quantized, tmp_path):
    import subprocess
    import sys

    assert quantized("--technique", r"lean:rounds=0,where=layers\.0\.").code == 0
    code = (
        "import tightfit, sys; assert 'torch' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'small')!r})\n"
        f"words = AutoTokenizer.from_pretrained({str(tmp_path / 'small')!r})('The sea', return_tensors='pt')\n"
        "print(type(model.model.layers[0].mlp.up_proj.codec).__name__, model.generate(**words, max_new_tokens=3).shape[1])\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split()[0] == "TableCodec"


def test_the_plan_is_told_and_nothing_is_written(quantized, tmp_path):
    said = quantized("--plan-only", "--technique", "gptq:bits=4,group=64,search=mse", "--json")
    plan = json.loads(said.out)
    assert (plan["technique"], plan["layers"], plan["states_on"]) == ("gptq", 84, "ram")
    assert plan["bits_per_weight"] == pytest.approx(4 + 24 / 64)
    assert not (tmp_path / "small").exists()


def test_the_model_is_described_once_for_the_plan_and_fetched_for_the_work(quantized, monkeypatch):
    from tightfit.describe import source
    from tightfit.verbs import quantizing

    fetched, describe = [], source.describe

    def counted(model, task="generate", random_weights=False, fetch=True):
        fetched.append(fetch)
        return describe(model, task, random_weights, fetch)

    monkeypatch.setattr(source, "describe", counted)
    monkeypatch.setattr(quantizing, "describe", counted)
    assert quantized("--technique", "rtn").code == 0
    assert fetched == [False, True]


def test_states_go_to_the_disk_where_ram_is_short(text, tightfit_says):
    def planned(ram):
        given = ("--plan-only", "--json", "--context", 256, "--samples", 128, "--ram", ram)
        return tightfit_says("quantize", "tightfit-demo", text.parent / "long.txt", *given)

    (text.parent / "long.txt").write_text(text.read_text() * 60)
    needed = json.loads(planned("8GiB").out)
    roomy = needed["predicted_bytes"]
    short = json.loads(planned(f"{roomy // 1024 - 1024}KiB").out)
    assert (needed["states_on"], short["states_on"]) == ("ram", "disk")
    refused = planned("400MiB")
    assert refused.code == 1 and "quantized with `lean` needs" in refused.err and "hint:" in refused.err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--bits", 5], "`lean:bits` cannot be 5"),
        (["--technique", "leen"], "did you mean `lean`"),
        (["--technique", "nf4"], "`nf4` does not quantize to files"),
        (["--technique", "gptq:group=48"], "groups of 48"),
        (["--technique", "gptq:group=96"], "divide"),
        (["--technique", "lean:group=64"], "`lean:group` goes with `grid=affine`"),
        (["--technique", "gptq:damping=0"], "share between 0 and 1"),
        (["--technique", "lean:power=x"], "is a number"),
        (["--context", 4096], "positions"),
        (["--context", 900], "fewer than one sample"),
    ],
)
def test_faults_are_one_line_and_a_hint(arguments, line, quantized, tmp_path):
    said = quantized(*arguments)
    assert said.code == 1 and line in said.err and "Traceback" not in said.err
    assert not list(tmp_path.glob("small*"))


def test_more_faults(tightfit_says, text, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    for arguments, line in [
        (["tightfit-demo", text], "needs a folder to write to"),
        (["tightfit-demo", "-o", tmp_path / "x"], "needs a text"),
        (["tightfit-demo", tmp_path / "no.txt", "-o", tmp_path / "x"], "cannot read"),
        (["tightfit-demo", tmp_path / "empty.txt", "-o", tmp_path / "x"], "holds no text"),
        (["llama-3.1-8b", text, "-o", tmp_path / "x"], "is a preset"),
        (["tightfit-demo", text, "-o", text], "is there already"),
    ]:
        said = tightfit_says("quantize", *arguments, "--ram", "2GiB")
        assert said.code == 1 and line in said.err, (arguments, said.err)
    assert not (tmp_path / "x").exists()


def test_a_quantized_model_is_not_quantized_again_by_any_way(quantized, tightfit_says, text, tmp_path):
    assert quantized("--technique", "rtn").code == 0
    again = tightfit_says("quantize", tmp_path / "small", text, "-o", tmp_path / "x", "--ram", "2GiB")
    assert again.code == 1 and "already quantized, to 4 bits" in again.err
    loaded = tightfit_says("plan", tmp_path / "small", "--ram", "2GiB", "--technique", "nf4")
    assert loaded.code == 1 and "found no linear layer" in loaded.err


def test_nan_weights_are_named(saved, tightfit_says, text, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(saved("llama"), tmp_path / "bad")
    weights = load_file(tmp_path / "bad" / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    said = tightfit_says("quantize", tmp_path / "bad", "-o", tmp_path / "x", "--technique", "rtn", "--ram", "2GiB")
    assert said.code == 1 and "`model.layers.2.mlp.up_proj.weight` holds NaN" in said.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("technique", ["lora:rank=2", "side:reduction=4", "--full"])
def test_a_quantized_model_is_tuned_beside_and_never_itself(technique, quantized, tightfit_says, tmp_path):
    assert quantized("--technique", "rtn:bits=3").code == 0
    (tmp_path / "orders.jsonl").write_text('{"prompt": "The sea", "completion": " was calm."}\n' * 4)
    way = ["--full"] if technique == "--full" else ["--technique", technique]
    told = ("--ram", "2GiB", "--steps", 2, "--batch", 2, "--json")
    said = tightfit_says("tune", tmp_path / "small", tmp_path / "orders.jsonl", "-o", tmp_path / "out", *way, *told)
    if technique == "--full":
        assert said.code == 1 and "a model in few bits cannot be tuned itself" in said.err
        return
    assert said.code == 0, said.err
    report = json.loads(said.out)
    assert abs(report["deviation"]) < 0.01 and report["scores"]["steps"] == 2
    told = ("--prompt", "The sea", "--max-new-tokens", 3, "--ram", "2GiB", "--json")
    assert tightfit_says("run", tmp_path / "small", "--adapter", tmp_path / "out", *told).code == 0
