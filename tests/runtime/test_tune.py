"""The loop: the same losses however a batch is split, interrupted or resumed; the plan is kept; what is bad is refused in one line."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from tightfit.runtime.journal import read_journal
from tightfit.runtime.tune import rate_factor
from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError
from tightfit.terms.tuning import Tuning
from tightfit.verbs.tuning import plan_tuning, read_lesson, tune

WIDE = Budget.parse(None, "64GiB", "10GiB")
QUICK = Tuning(steps=6, learning_rate=1e-2, save_every=2)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A small Llama with the demo model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tightfit.presets import presets

    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(presets()["tightfit-demo"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Answers of unlike lengths."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(1, n + 1)))} for n in range(1, 14)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def run(
    base, data, out, tuning=QUICK, batch=4, techniques=("lora:rank=4",), budget=WIDE, resume=False, held_out=None, watch=None, **kwargs
):
    lesson = read_lesson(str(base), str(data), tuning=tuning, held_out=held_out and str(held_out))
    planned = plan_tuning(str(base), lesson, batch, budget, "exact", techniques, **kwargs)
    report = tune(planned, lesson, str(out), tuning, resume, watch=watch or (lambda done, whole, loss: None))
    return report, [line for line in read_journal(Path(out) / "log.jsonl") if "loss" in line]


def losses(log):
    return [line["loss"] for line in log]


def adapter_bytes(out):
    return next(Path(out).glob("*model.safetensors")).read_bytes()


def plain_loop(base, data, tuning, batch):
    """Full tuning in plain PyTorch: its own padding, mean, schedule, clipping and AdamW; only the order of samples is the loop's."""
    from transformers import LlamaForCausalLM

    from tightfit.data.text import Order

    model = LlamaForCausalLM.from_pretrained(base)
    samples = read_lesson(str(base), str(data), tuning=tuning).samples
    order = Order(len(samples), batch, tuning.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=tuning.learning_rate, weight_decay=0.0)
    seen = []
    for step in range(tuning.steps):
        warmup = math.ceil(tuning.warmup * tuning.steps)
        done = (step - warmup) / (tuning.steps - warmup)
        share = (step + 1) / (warmup + 1) if step < warmup else 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = tuning.learning_rate * share
        summed, count = 0.0, 0
        for index in order.indices(step):  # one by one: nothing is padded
            ids, labels = (torch.from_numpy(part.astype("int64")) for part in samples.sample(index))
            logits = model(input_ids=ids[None]).logits[0]
            summed = summed + cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
            count += int((labels[1:] != -100).sum())
        (summed / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), tuning.clip)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(summed.detach() / count))
    return seen, model


def test_the_losses_are_those_of_a_plain_loop(base, data, tmp_path):
    from transformers import LlamaForCausalLM

    expected, model = plain_loop(base, data, QUICK, 4)
    _, log = run(base, data, tmp_path / "out", techniques=())
    assert losses(log) == pytest.approx(expected, rel=1e-4)
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for (name, want), (_, have) in zip(model.named_parameters(), saved.named_parameters(), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-2, atol=2e-3, msg=name)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_split_batch_has_the_losses_of_the_whole(base, data, tmp_path, rows):
    _, whole = run(base, data, tmp_path / "whole")
    _, split = run(base, data, tmp_path / "split", micro_batch=rows)
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)
    assert [line["tokens"] for line in split] == [line["tokens"] for line in whole]


def test_a_longer_batch_than_planned_is_split_and_the_effective_batch_kept(base, data, tmp_path, monkeypatch):
    """The plan foresees 3 rows of 14 tokens; the data has rows of up to 40: fewer rows at a time, and the same losses."""
    from tightfit import steps

    _, expected = run(base, data, tmp_path / "expected")
    seen, backward = [], steps.backward
    monkeypatch.setattr(
        steps,
        "backward",
        lambda model, batch, *args, **kwargs: seen.append(batch["input_ids"].shape) or backward(model, batch, *args, **kwargs),
    )
    lesson = read_lesson(str(base), str(data))
    planned = plan_tuning(str(base), lesson, 4, WIDE, "exact", ("lora:rank=4",))
    longest = lesson.samples.longest
    short = replace(planned, workload=replace(planned.workload, tokens=longest // 2, micro_batch=4))
    seen.clear()  # of what the rehearsal ran
    tune(short, lesson, str(tmp_path / "out"), QUICK)
    assert losses([line for line in read_journal(tmp_path / "out" / "log.jsonl") if "loss" in line]) == pytest.approx(
        losses(expected), rel=1e-5
    )
    assert max(rows * length for rows, length in seen) <= 4 * (longest // 2)
    assert max(length for _, length in seen) == longest


KINDS = {
    "lora with dropout": ("lora:rank=4,dropout=0.2",),
    "nf4 and recompute": ("nf4", "lora:rank=4,dropout=0.1", "recompute"),
    "dylora": ("dylora:rank=6",),
    "side": ("side:reduction=4,rank=4",),
    "full": (),
}


@pytest.mark.parametrize("techniques", KINDS.values(), ids=KINDS)
def test_a_resumed_run_is_an_uninterrupted_one_to_the_bit(base, data, tmp_path, techniques):
    def stop(done, whole, loss):
        if done == 5:
            raise KeyboardInterrupt

    _, straight = run(base, data, tmp_path / "straight", techniques=techniques)
    with pytest.raises(KeyboardInterrupt):
        run(base, data, tmp_path / "broken", techniques=techniques, watch=stop)
    assert sorted(path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    _, resumed = run(base, data, tmp_path / "broken", techniques=techniques, resume=True)
    assert losses(resumed) == losses(straight)
    assert [line["gradient_norm"] for line in resumed] == [line["gradient_norm"] for line in straight]
    assert adapter_bytes(tmp_path / "broken") == adapter_bytes(tmp_path / "straight")


def test_the_frozen_base_streams_while_tuning(base, data, tmp_path):
    """Blocks taking turns from disk: the same losses and adapter, to the bit."""
    lesson = read_lesson(str(base), str(data))
    planned = plan_tuning(str(base), lesson, 4, WIDE, "exact", ("lora:rank=4", "recompute"))
    tune(planned, lesson, str(tmp_path / "resident"), QUICK)
    streamed = replace(
        planned, techniques={**planned.techniques, "offload": {"streamed": (0, 1, 2), "slots": 2}}, residency=("disk", "disk", "disk")
    )
    report = tune(streamed, lesson, str(tmp_path / "streamed"), QUICK)
    assert report.moved_bytes > 0
    assert adapter_bytes(tmp_path / "resident") == adapter_bytes(tmp_path / "streamed")


@pytest.mark.parametrize("techniques", [("lora:rank=4",), ("nf4", "lora:rank=4", "recompute"), ("side:reduction=4",), ()])
def test_the_plan_is_kept(base, data, tmp_path, techniques):
    report, _ = run(base, data, tmp_path / "out", replace(QUICK, steps=12), batch=13, techniques=techniques)
    assert report.complete
    assert abs(report.deviation) < 0.01, (report.measured, report.plan.predicted)
    assert report.warnings == ()


def test_gradients_of_earlier_passes_are_foreseen(base, tmp_path):
    """Full tuning in two passes holds all gradients during the second: more than one pass needs."""
    data = tmp_path / "alike.jsonl"
    data.write_text("\n".join([json.dumps({"instruction": "Count.", "output": "one two three four five six seven"})] * 12))
    report, _ = run(base, data, tmp_path / "out", batch=12, techniques=(), micro_batch=6)
    assert report.complete
    assert abs(report.deviation) < 0.01, (report.measured, report.plan.predicted)


def test_held_out_loss_is_the_mean_over_its_tokens(base, data, tmp_path):
    from transformers import LlamaForCausalLM

    held = tmp_path / "held.jsonl"
    held.write_text(
        json.dumps({"instruction": "Add.", "output": "one two three"}) + "\n" + json.dumps({"instruction": "No.", "output": "five"})
    )
    report, _ = run(base, data, tmp_path / "out", held_out=held)
    samples, model = read_lesson(str(base), str(held)).samples, LlamaForCausalLM.from_pretrained(base)
    summed, count = 0.0, 0
    for index in range(2):
        ids, labels = (torch.from_numpy(part.astype("int64")) for part in samples.sample(index))
        summed += float(cross_entropy(model(input_ids=ids[None]).logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum"))
        count += int((labels[1:] != -100).sum())
    assert report.scores["held_out_loss_before"] == pytest.approx(summed / count, rel=1e-5)
    assert report.scores["held_out_loss"] < report.scores["held_out_loss_before"]


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(base, data, tmp_path, monkeypatch):
    from tightfit import steps

    loss_of = steps.loss_of

    def spoil(done, whole, loss):
        if done == 4:
            monkeypatch.setattr(steps, "loss_of", lambda model, batch: loss_of(model, batch) * math.nan)

    with pytest.raises(TightfitError, match=r"the loss is not finite at step 5; its state after step 4 is in `.*step-000004`") as error:
        run(base, data, tmp_path / "out", watch=spoil)
    assert "--lr" in error.value.hint
    monkeypatch.undo()
    _, straight = run(base, data, tmp_path / "straight")
    _, resumed = run(base, data, tmp_path / "out", resume=True)
    assert losses(resumed) == losses(straight)


def other_base(base, tmp_path):
    from transformers import LlamaForCausalLM

    changed = tmp_path / "base"
    shutil.copytree(base, changed)
    model = LlamaForCausalLM.from_pretrained(changed)
    model.model.layers[1].mlp.up_proj.weight.data += 0.01
    return changed, model


def test_what_changes_no_loss_may_change_in_a_resumed_run(base, data, tmp_path):
    run(base, data, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000006")
    run(base, data, tmp_path / "out", replace(QUICK, save_every=1, keep=5, evaluate_every=1), resume=True)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("batch", {"batch": 5}),
        ("techniques", {"techniques": ("lora:rank=8",)}),
        ("setting `learning_rate`", {"tuning": replace(QUICK, learning_rate=1e-3)}),
        ("micro-batch", {"micro_batch": 2}),
    ],
)
def test_resuming_into_something_else_is_refused(base, data, tmp_path, name, asked):
    run(base, data, tmp_path / "out")
    before = adapter_bytes(tmp_path / "out")
    with pytest.raises(TightfitError, match=f"was tuned with another {name}"):
        run(base, data, tmp_path / "out", resume=True, **asked)
    assert adapter_bytes(tmp_path / "out") == before


def test_resuming_on_a_base_that_changed_is_refused(base, data, tmp_path):
    changed, model = other_base(base, tmp_path)
    run(changed, data, tmp_path / "out")
    model.save_pretrained(changed)
    with pytest.raises(TightfitError, match="was tuned with another base"):
        run(changed, data, tmp_path / "out", resume=True)


def test_folders_in_use_and_runs_that_are_not_there(base, data, tmp_path):
    run(base, data, tmp_path / "out")
    with pytest.raises(TightfitError, match="holds a run already") as error:
        run(base, data, tmp_path / "out")
    assert "--resume" in error.value.hint
    with pytest.raises(TightfitError, match=r"is over: 6 of 6 steps"):
        run(base, data, tmp_path / "out", resume=True)
    with pytest.raises(TightfitError, match="no run in"):
        run(base, data, tmp_path / "nothing", resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(TightfitError, match="is not an empty folder"):
        run(base, data, tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"


def test_a_damaged_checkpoint_is_named(base, data, tmp_path):
    run(base, data, tmp_path / "out", replace(QUICK, steps=6))
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000006")
    file = tmp_path / "out" / "checkpoints" / "step-000004" / "state" / "optimizer.bin"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TightfitError, match=r"the checkpoint `.*step-000004` is damaged") as error:
        run(base, data, tmp_path / "out", resume=True)
    assert "the one before" in error.value.hint


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_schedules_are_those_of_transformers(schedule):
    """Beside transformers' own, but that the first step of a warm-up is not lost on a rate of zero."""
    from transformers import get_scheduler

    tuning, warmup = Tuning(schedule=schedule, warmup=0.2), 4
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    for step in range(20):
        if step >= warmup or schedule == "constant":
            assert rate_factor(tuning, 20, step) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        else:
            assert rate_factor(tuning, 20, step) == pytest.approx((step + 1) / (warmup + 1))
        optimizer.step()
        reference.step()


COMMAND = [
    sys.executable,
    "-m",
    "tightfit",
    "tune",
    "--ram",
    "64GiB",
    "--disk",
    "10GiB",
    "--batch",
    "4",
    "--steps",
    "40",
    "--save-every",
    "1",
]


def test_a_killed_run_leaves_a_whole_checkpoint_and_goes_on(base, data, tmp_path):
    """SIGKILL at arbitrary moments, often in the middle of a checkpoint, since every step writes one."""
    out = tmp_path / "out"
    command = [*COMMAND, str(base), str(data), "-o", str(out), "--technique", "lora:rank=4"]
    for kill, extra in enumerate([[], ["--resume"]]):
        process = subprocess.Popen([*command, *extra], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, deadline = len(read_journal(out / "log.jsonl")), time.monotonic() + 100
        while len(read_journal(out / "log.jsonl")) < 4 * (kill + 1) + kill or len(read_journal(out / "log.jsonl")) <= before:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps = sorted(path for path in (out / "checkpoints").glob("step-*"))
        assert steps
        for path in steps:
            assert {"adapter_model.safetensors", "schedule.bin", "state", "tightfit.json"} <= {item.name for item in path.iterdir()}
            assert torch.load(path / "state" / "optimizer.bin", weights_only=False)["state"]
    done = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _, straight = run(base, data, tmp_path / "straight", Tuning(steps=40, save_every=1))
    assert losses([line for line in read_journal(out / "log.jsonl") if "loss" in line]) == losses(straight)
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.parametrize("technique", ["lora:rank=4", "dylora:rank=4"])
def test_two_processes_learn_what_one_does(base, data, tmp_path, technique):
    """Distributed data-parallel over gloo, 13 samples by 5 to a step: the same losses, with an evaluation, checkpoints and a resumption.

    The last step of an epoch has 3 rows, and with 4 to a step a single one, which leaves the second process idle.
    """
    script = tmp_path / "main.py"
    script.write_text(
        "import json, os, sys\nfrom tightfit.cli import main\n"
        "assert os.environ['WORLD_SIZE'] == '2'\nif __name__ == '__main__':\n    main()\n"
    )
    words = ["tune", str(base), str(data), "-o", str(tmp_path / "out"), "--ram", "64GiB", "--disk", "10GiB", "--batch", "4", "--steps", "5"]
    words += ["--learning-rate", "0.01", "--save-every", "2", "--technique", technique, "--eval", str(data)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), *words]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    _, alone = run(base, data, tmp_path / "alone", replace(QUICK, steps=5), techniques=(technique,), held_out=data)
    log = read_journal(tmp_path / "out" / "log.jsonl")
    assert losses([line for line in log if "loss" in line]) == pytest.approx(losses(alone), rel=1e-4)
    before = [line["held_out_loss"] for line in read_journal(tmp_path / "alone" / "log.jsonl") if "held_out_loss" in line]
    assert [line["held_out_loss"] for line in log if "held_out_loss" in line] == pytest.approx(before, rel=1e-4)
    states = tmp_path / "out" / "checkpoints" / "step-000004" / "state"
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= {path.name for path in states.iterdir()}
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000005")
    again = subprocess.run([*launch, "--resume"], capture_output=True, text=True, check=False, env=environment)
    assert again.returncode == 0, again.stderr[-2000:]
    resumed = [line["loss"] for line in read_journal(tmp_path / "out" / "log.jsonl") if "loss" in line]
    assert resumed == losses([line for line in log if "loss" in line])


def test_a_run_killed_before_its_adapter_was_put_in_place_is_finished(base, data, tmp_path):
    _, straight = run(base, data, tmp_path / "out")
    adapter = adapter_bytes(tmp_path / "out")
    for path in [*(tmp_path / "out").glob("adapter_*"), tmp_path / "out" / "tightfit.json"]:
        path.unlink()
    report, log = run(base, data, tmp_path / "out", resume=True)
    assert adapter_bytes(tmp_path / "out") == adapter
    assert report.scores["loss"] == losses(straight)[-1] and losses(log) == losses(straight)


def test_a_run_that_saved_nothing_gives_way(base, data, tmp_path):
    def stop(done, whole, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(base, data, tmp_path / "out", watch=stop)
    run(base, data, tmp_path / "out", replace(QUICK, learning_rate=1e-3))


def test_a_single_step_is_measured(base, data, tmp_path):
    report, _ = run(base, data, tmp_path / "out", replace(QUICK, steps=1))
    assert report.measured_bytes > 0


def test_no_step_is_refused(base, data, tmp_path):
    with pytest.raises(TightfitError, match="no step to make"):
        run(base, data, tmp_path / "out", Tuning(epochs=0.0))


@pytest.mark.parametrize(
    "wrong", [{"schedule": "cosin"}, {"learn": "answers"}, {"learning_rate": -1.0}, {"clip": math.nan}, {"warmup": 2.0}, {"keep": 0}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(TightfitError):
        Tuning(**wrong)


def test_a_longer_held_out_sample_is_planned_for(base, data, tmp_path):
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"instruction": "Count.", "output": " ".join(["one"] * 200)}))
    report, _ = run(base, data, tmp_path / "out", held_out=held)
    assert report.plan.workload.tokens > 200 and math.isfinite(report.scores["held_out_loss"])


def test_a_quantized_model_cannot_be_tuned_itself(base, data, tmp_path):
    with pytest.raises(TightfitError, match="a model in `nf4` cannot be tuned itself"):
        run(base, data, tmp_path / "out", techniques=("nf4",))
    assert not (tmp_path / "out").exists()


def test_the_config_of_a_tuned_model_is_as_it_was(base, data, tmp_path):
    run(base, data, tmp_path / "out", techniques=())
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out"))
    assert after.get("use_cache") == before.get("use_cache")


def test_the_environment_of_accelerate_changes_no_gradient(base, data, tmp_path, monkeypatch):
    _, straight = run(base, data, tmp_path / "straight")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    _, log = run(base, data, tmp_path / "out")
    assert [line["gradient_norm"] for line in log] == [line["gradient_norm"] for line in straight]


@pytest.mark.parametrize("fault", ["garbage", "no random states"])
def test_states_that_cannot_be_read_are_named(base, data, tmp_path, fault):
    run(base, data, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000006")
    state = tmp_path / "out" / "checkpoints" / "step-000004" / "state"
    (state / "optimizer.bin").write_bytes(b"garbage") if fault == "garbage" else (state / "random_states_0.pkl").unlink()
    with pytest.raises(TightfitError, match="is damaged"):
        run(base, data, tmp_path / "out", resume=True)


def test_over_the_budget_a_checkpoint_is_saved_first(base, data, tmp_path, monkeypatch):
    from tightfit.runtime import observe

    calls = iter(range(100))
    monkeypatch.setattr(observe.Account, "refuse_overrun", lambda self: stop() if next(calls) == 2 else None)

    def stop():
        raise TightfitError("stopped: the process holds too much")

    with pytest.raises(TightfitError, match="stopped"):
        run(base, data, tmp_path / "out")
    assert [path.name for path in sorted((tmp_path / "out" / "checkpoints").iterdir())] == ["step-000002", "step-000003"]


@pytest.mark.parametrize("techniques", [("lora:rank=4",), ("side:reduction=4",), ()], ids=["lora", "side", "full"])
def test_mixed_precision_is_planned_too(base, data, tmp_path, techniques):
    """Products in bfloat16: nearly the same losses, and the bytes of the plan, in which a frozen base rests in bfloat16."""
    report, log = run(base, data, tmp_path / "bf16", batch=13, techniques=techniques, precision="bf16")
    _, exact = run(base, data, tmp_path / "exact", batch=13, techniques=techniques)
    assert report.complete
    assert abs(report.deviation) < 0.01, (report.measured, report.plan.predicted)
    assert losses(log) == pytest.approx(losses(exact), rel=2e-2)
    assert losses(log) != losses(exact)


def test_samples_in_memory_are_part_of_the_plan(base, data):
    lesson = read_lesson(str(base), str(data))
    twice = replace(lesson, held_out=lesson.samples)
    first, second = (plan_tuning(str(base), part, 4, WIDE, "exact", ("lora:rank=4",)) for part in (lesson, twice))
    assert second.predicted_bytes("ram") - first.predicted_bytes("ram") == lesson.samples.held_bytes > 0


def test_encoder_decoders_learn_answers(data, tmp_path):
    """T5: the question is read, the answer is written; the plan's tokens are those of the longer side."""
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    from tightfit.presets import presets

    tokenizer = AutoTokenizer.from_pretrained(presets()["tightfit-demo"])
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=len(tokenizer), **sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=tokenizer.eos_token_id)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    report, log = run(tmp_path / "t5", data, tmp_path / "out", replace(QUICK, steps=12), batch=13)
    work = report.plan.workload
    assert log[-1]["loss"] < log[0]["loss"]
    assert work.tokens != work.target_tokens > 0
    assert abs(report.deviation) < 0.01, (report.measured, report.plan.predicted)
