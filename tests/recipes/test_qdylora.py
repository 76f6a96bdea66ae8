"""QDyLoRA: its sentence is QLoRA's with nested ranks, and each loss in its table is that of the LoRA that PEFT cuts out."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy

import tightfit
from tightfit.recipes import Told
from tightfit.recipes.qdylora import ranks_to, run
from tightfit.verbs.tuning import read_lesson

MODEL = "tightfit-demo"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What is learned, and what is held out."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1, n + 1)))} for n in range(5, 15)]
    for name, part in (("train", rows[::2]), ("held", rows[1::2])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return str(folder / "train.jsonl"), str(folder / "held.jsonl")


@pytest.fixture(scope="module")
def ran(data, tmp_path_factory):
    """Six steps at a high rate, so that ranks differ: the report, what was found, and the folder."""
    out, found = tmp_path_factory.mktemp("runs") / "out", []
    settings = {"steps": 6, "rank": 3, "learning_rate": 1e-2, "mixed_precision": "no", "export": True}
    report = run(MODEL, data[0], str(out), held_out=data[1], ram="64GiB", disk="1GiB", told=Told(finding=found.append), **settings)
    return report, found, out


def losses(report):
    prefix = "held_out_loss_rank_"
    return {int(name.removeprefix(prefix)): loss for name, loss in report.scores.items() if name.startswith(prefix)}


@pytest.mark.parametrize(("largest", "ranks"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 2, 4, 6]), (64, [1, 2, 4, 8, 16, 32, 64])])
def test_ranks_double_up_to_the_largest(largest, ranks):
    assert ranks_to(largest) == ranks


def test_the_settings_are_qloras_with_nested_ranks(ran):
    report, _, out = ran
    asked, note = (json.loads((out / name).read_text()) for name in ("request.json", "tightfit.json"))
    assert note["technique"] == "dylora"
    assert {name: note["settings"][name] for name in ("rank", "alpha", "dropout", "least", "mode", "where")} == {
        "rank": 3,
        "alpha": 16.0,
        "dropout": 0.1,
        "least": 1,
        "mode": "full",
        "where": "",
    }
    assert (asked["setting `schedule`"], asked["setting `warmup`"], asked["setting `clip`"]) == ("constant_with_warmup", 0.03, 0.3)
    assert report.plan.techniques["nf4"] == {"layout": "standard"}
    assert report.plan.workload.batch == 5, "sixteen, or all that there are"


def test_the_table_has_every_rank_and_names_the_best(ran):
    report, found, _ = ran
    table = losses(report)
    assert list(table) == [1, 2, 3]
    assert report.scores["best_rank"] == min(table, key=table.get)
    assert found == [f"rank {rank}: held-out loss {loss:.4f}" for rank, loss in table.items()]


def test_the_largest_rank_has_the_loss_that_the_loop_measured(ran):
    report, _, _ = ran
    assert losses(report)[3] == pytest.approx(report.scores["held_out_loss"], rel=1e-6)


def test_each_loss_is_that_of_the_exported_lora_in_peft(ran, data):
    """By hand: transformers' model with the weights that NF4 stands for, PEFT's adapter of that rank, plain cross-entropy."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tightfit.presets import presets

    report, _, out = ran
    held = read_lesson(MODEL, data[1]).samples
    table = losses(report)
    assert max(table.values()) > 1.02 * min(table.values()), "else any adapter would pass"
    for rank, loss in table.items():
        dense = AutoModelForCausalLM.from_pretrained(presets()[MODEL], dtype=torch.float32)
        quantized = tightfit.apply(AutoModelForCausalLM.from_pretrained(presets()[MODEL], dtype=torch.bfloat16), ["nf4:layout=standard"])
        for path, layer in dense.model.layers.named_modules():
            if isinstance(layer, torch.nn.Linear):
                stored = quantized.model.layers.get_submodule(path)
                layer.weight.data = stored(torch.eye(layer.in_features, dtype=torch.bfloat16)).T.float()
        model = PeftModel.from_pretrained(dense, out / f"rank-{rank}").eval()
        assert model.peft_config["default"].r == rank
        summed, count = 0.0, 0
        for at in range(len(held)):
            ids, labels = (torch.from_numpy(part.astype("int64")) for part in held.sample(at))
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0]
            summed += float(cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum"))
            count += int((labels[1:] != -100).sum())
        assert loss == pytest.approx(summed / count, rel=5e-3)
