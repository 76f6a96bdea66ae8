"""The command line's `tune`, `export` and `--adapter`: from a data file to an adapter that is used, and every fault in one line."""

import json
from pathlib import Path

import pytest

ROWS = [{"instruction": f"Say {word}.", "output": f"{word} {word} {word}"} for word in ("one", "two", "red", "blue", "sea", "sun")]
PLACE = ["--ram", "64GiB", "--disk", "10GiB"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "sample.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return str(file)


_DONE = {}


@pytest.fixture
def tuned(data, tmp_path_factory, tightfit_says):
    """One run, for all that looks at it."""
    if not _DONE:
        out = str(tmp_path_factory.mktemp("runs") / "out")
        words = ["tune", "tightfit-demo", data, "-o", out, *PLACE, "--batch", 3, "--steps", 4, "--lr", "2e-3", "--eval", data]
        _DONE["run"] = out, tightfit_says(*words, "--technique", "dylora:rank=4", "--track", "tensorboard", "--save-every", 2)
    return _DONE["run"]


def test_tune_says_what_it_plans_learns_and_leaves(tuned):
    out, said = tuned
    assert said.code == 0, said.err
    assert said.out.startswith("loss ") and "held out" in said.out and "→" in said.out
    assert "one step over 3 ×" in said.err and "dylora, chunked_loss" in said.err
    assert f"tightfit run tightfit-demo --adapter {out}" in said.err.replace("\n", "")
    names = {path.name for path in Path(out).iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tightfit.json",
        "plan.json",
        "request.json",
        "log.jsonl",
        "checkpoints",
        "tensorboard",
    }
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [0, 4]
    assert all(line.keys() >= {"loss", "learning_rate", "gradient_norm", "tokens", "seconds"} for line in lines if "loss" in line)
    assert list(Path(out, "tensorboard").rglob("events.*"))


def test_the_adapter_changes_what_the_model_says(tuned, data, tightfit_says):
    out, _ = tuned
    words = ["eval", "tightfit-demo", data, *PLACE, "--json"]
    plain, adapted = (json.loads(tightfit_says(*words, *more).out) for more in ([], ["--adapter", out]))
    assert adapted["perplexity"] < plain["perplexity"]
    assert adapted["report"]["plan"]["adapter"] == out
    run = tightfit_says("run", "tightfit-demo", "--adapter", out, "--prompt", "Say one.", "--max-new-tokens", 4, *PLACE, "--json")
    assert run.code == 0 and "dylora" in json.loads(run.out)["plan"]["techniques"]


def test_export_writes_the_ranks_of_a_nested_adapter(tuned, tmp_path, tightfit_says):
    out, _ = tuned
    said = tightfit_says("export", out, "-o", tmp_path / "r2", "--rank", 2)
    assert said.code == 0, said.err
    config = json.loads((tmp_path / "r2" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 2)
    too_large = tightfit_says("export", out, "-o", tmp_path / "r9", "--rank", 9)
    assert too_large.code == 1 and too_large.err.startswith("error:") and not (tmp_path / "r9").exists()


def test_a_finished_run_is_not_overwritten(tuned, data, tightfit_says):
    out, _ = tuned
    said = tightfit_says("tune", "tightfit-demo", data, "-o", out, *PLACE)
    assert said.code == 1 and "holds a run already" in said.err and "--resume" in said.err
    other = tightfit_says("tune", "tightfit-demo", data, "-o", out, *PLACE, "--resume", "--technique", "dylora:rank=4", "--lr", "1e-3")
    assert other.code == 1 and "was tuned with another" in other.err


@pytest.mark.parametrize(
    ("words", "line", "hint"),
    [
        (["--technique", "lora", "--full"], "`--full` tunes the model itself", "leave out"),
        (["--technique", "lorra"], "no technique is called `lorra`", "did you mean"),
        (["--schedule", "cosin"], "no schedule is called `cosin`", "did you mean `cosine`"),
        (["--learn", "answers"], "no way to learn is called `answers`", "completion"),
        (["--track", "tensorbord"], "accelerate refuses", "tensorboard"),
        (["--mixed-precision", "fp8"], "no mixed precision is called `fp8`", "bf16"),
        (["--ram", "100MiB"], "the budget is 100.0 MiB", "--ram"),
        (["--eval", "nothing.jsonl"], "nothing.jsonl", ""),
        (["--context", "5000"], "positions", ""),
    ],
)
def test_faults_are_one_line_and_leave_nothing(words, line, hint, data, tmp_path, tightfit_says):
    said = tightfit_says("tune", "tightfit-demo", data, "-o", tmp_path / "out", *PLACE, "--steps", 1, *words)
    assert said.code == 1
    assert line in said.err and hint in said.err and "Traceback" not in said.err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_an_adapter_technique_is_added_where_only_a_quantization_is_named(data, tmp_path, tightfit_says):
    said = tightfit_says("tune", "tightfit-demo", data, "-o", tmp_path / "out", *PLACE, "--steps", 1, "--technique", "int8", "--json")
    assert set(json.loads(said.out)["plan"]["techniques"]) == {"int8", "lora", "chunked_loss"}


def test_models_that_predict_no_next_token_are_refused(data, tmp_path, tightfit_says, saved):
    said = tightfit_says("tune", saved("bert"), data, "-o", tmp_path / "out", *PLACE)
    assert said.code == 1 and "does not predict the next token" in said.err and "Trainer" in said.err
