"""LeanQuant: its sentence is the paper's, and both perplexities are those of plain transformers."""

import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from tightfit.presets import presets
from tightfit.recipes import Told
from tightfit.recipes.leanquant import run
from tightfit.techniques.lean import Lean

SMALL = {"bits": 2, "samples": 4, "context": 32}
ROOM = {"ram": "64GiB", "disk": "1GiB"}
LAYERS = 14


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The first two blocks of the demo model."""
    folder = tmp_path_factory.mktemp("models") / "short"
    dense = AutoModelForCausalLM.from_pretrained(presets()["tightfit-demo"], num_hidden_layers=2)
    dense.save_pretrained(folder)
    AutoTokenizer.from_pretrained(presets()["tightfit-demo"]).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What is read, and what is held out."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "read.txt").write_text("The old man sat by the door, and looked at the road that led down to the sea. " * 12)
    (folder / "held.txt").write_text("It was a bright morning. She went to the window, and saw that the ship had come in at last. " * 4)
    return str(folder / "read.txt"), str(folder / "held.txt")


@pytest.fixture(scope="module")
def ran(model, data, tmp_path_factory):
    """A run in two bits: the report, what was told in its order, and the folder."""
    out, said = tmp_path_factory.mktemp("runs") / "out", []
    told = Told(
        planned=lambda plan: said.append(("planned", plan)),
        solving=lambda done, whole, layer: said.append(("solving", (done, whole))),
        scoring=lambda done, whole: said.append(("scoring", (done, whole))),
        finding=lambda line: said.append(("finding", line)),
    )
    return run(model, data[0], str(out), held_out=data[1], told=told, **SMALL, **ROOM), said, out


def test_the_settings_are_the_papers(ran):
    report, _, out = ran
    defaults = {name: item.default for name, item in inspect.signature(run).parameters.items()}
    assert (defaults["samples"], defaults["context"], defaults["bits"]) == (128, 2048, 4)
    assert report.plan.technique == "lean"
    assert report.plan.settings == {"bits": 2, "grid": "table", "group": 0, "power": 4.0, "rounds": 0, "damping": 0.1} | {
        "spread": False,
        "aim": 0.0,
    }
    assert (report.plan.samples, report.plan.tokens, report.plan.layers) == (4, 32, LAYERS)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bits"] == 2


def test_everything_is_told_in_its_order(ran):
    report, said, _ = ran
    order = [name for at, (name, _) in enumerate(said) if at == 0 or said[at - 1][0] != name]
    assert order == ["planned", "solving", "scoring", "finding"]
    assert dict(said)["planned"] == report.plan
    assert [value for name, value in said if name == "solving"] == [(done + 1, LAYERS) for done in range(LAYERS)]
    scored = [value[0] for name, value in said if name == "scoring"]
    whole = dict(said)["scoring"][1]
    assert scored == sorted(scored) and scored[-1] == whole and whole // 2 in scored
    before, after = report.scores["perplexity_before"], report.scores["perplexity"]
    assert said[-1][1] == f"perplexity {before:.3f} → {after:.3f}: {after / before:.3f} times as high at 2.21 bits a weight"


def test_both_perplexities_are_those_of_plain_transformers(model, ran, data):
    """By hand: windows of 32 tokens, each of which begins with the last one's last token."""
    report, _, out = ran
    found = {}
    for name, folder in (("perplexity_before", model), ("perplexity", out)):
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = AutoTokenizer.from_pretrained(folder)(Path(data[1]).read_text(), return_tensors="pt")["input_ids"][0]
        summed = 0.0
        for start in range(0, len(ids) - 1, 32):
            part = ids[start : start + 33]
            with torch.no_grad():
                logits = plain(part[None, :-1]).logits[0]
            summed += float(cross_entropy(logits.float(), part[1:], reduction="sum"))
        found[name] = math.exp(summed / (len(ids) - 1))
    assert {name: report.scores[name] for name in found} == pytest.approx(found, rel=5e-3)
    assert abs(found["perplexity"] / found["perplexity_before"] - 1) > 0.02, "else one could be the other"
    assert report.scores["perplexity_ratio"] == pytest.approx(found["perplexity"] / found["perplexity_before"], rel=1e-2)


def test_bits_a_weight_are_those_of_the_files(ran):
    report, _, out = ran
    held, weights = 0, 0
    for shard in out.glob("*.safetensors"):
        with safe_open(shard, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118  # not a mapping
                tensor = stream.get_tensor(name)
                if name.endswith("_proj.weight"):
                    weights += tensor.numel() * 8 // 2
                if "_proj.weight" in name:
                    held += 8 * tensor.nbytes
    assert weights == report.plan.weights
    assert report.scores["bits_per_weight"] == pytest.approx(held / weights)


def test_stopped_on_the_command_line_it_goes_on_to_the_same_files(model, ran, data, tightfit_says, tmp_path, monkeypatch):
    from tightfit.runtime import quantize

    write, written = quantize.write_tensors, []

    def stopping(file, tensors):
        if len(written) == 1:
            raise KeyboardInterrupt
        write(file, tensors)
        written.append((file, file.stat().st_mtime_ns))

    words = ["recipe", "leanquant", model, data[0], "-o", tmp_path / "out", "--held-out", data[1], "--bits", 2, "--samples", 4]
    words += ["--context", 32, "--ram", "64GiB", "--disk", "1GiB"]
    monkeypatch.setattr(quantize, "write_tensors", stopping)
    said = tightfit_says(*words)
    assert said.code == 130 and said.err.endswith(f"`--resume` goes on from what was saved for {tmp_path / 'out'}\n")
    assert "14 layers to 2.21 bits a weight with lean" in said.err and not (tmp_path / "out").exists()
    monkeypatch.undo()
    refused = tightfit_says(*words)
    assert refused.code == 1 and "holds a run that was not finished" in refused.err
    said = tightfit_says(*words, "--resume", "--save-report", tmp_path / "report.json")
    assert said.code == 0, said.err
    report, saved = ran[0], json.loads((tmp_path / "report.json").read_text())
    assert saved["scores"] == pytest.approx(dict(report.scores)) and saved["warnings"] == []
    assert [line.split() for line in said.out.splitlines()] == [
        [*name.split("_"), f"{score:.4f}"] for name, score in saved["scores"].items()
    ]
    assert f"use it with `tightfit run {tmp_path / 'out'} --prompt …`" in said.err and "process" in said.err
    for file, at in written:
        assert (tmp_path / "out" / file.name).stat().st_mtime_ns == at, "what was done is not done again"
    for shard in ran[2].glob("*.safetensors"):
        assert (tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--held-out", "no.txt"], "cannot read `no.txt`"),
        (["--held-out", "empty.txt"], "`empty.txt` holds no text"),
        (["--held-out", "held.txt", "--context", 4096], "positions"),
        (["--held-out", "held.txt", "--context", 512], "fewer than one sample"),
        (["--held-out", "held.txt", "--bits", 5], "`lean:bits` cannot be 5"),
        (["--held-out", "held.txt", "--group", 64], "`lean:group` goes with `grid=affine`"),
        (["--held-out", "held.txt", "--ram", "300MiB"], "the budget is 300"),
        (["--held-out", "held.txt", "-o", "taken"], "is there already"),
        ([], "Missing option '--held-out'"),
    ],
)
def test_all_is_refused_before_the_work(more, line, model, data, tightfit_says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Lean, "solve", lambda *_: pytest.fail("work began"))
    for name, text in (("empty.txt", "\n"), ("held.txt", "She went to the window."), ("taken", "a file")):
        (tmp_path / name).write_text(text)
    said = tightfit_says("recipe", "leanquant", model, data[0], "-o", "out", "--context", 32, *more)
    assert said.code in (1, 2) and said.out == "" and line in said.err and "Traceback" not in said.err
    assert {path.name for path in tmp_path.iterdir()} == {"empty.txt", "held.txt", "taken"}
