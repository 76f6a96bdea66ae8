"""Hugging Face `Trainer` trains what `tightfit.apply` returns, in its own loop."""

import copy
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from families import ids, make
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import tightfit
from tightfit import steps
from tightfit.runtime.adapters import load_adapter, read_adapter, save_adapter
from tightfit.runtime.callback import PolicyCallback

BESIDE = ["recompute", "chunked_loss:tokens=13"]
WAYS = {
    "lora": ["nf4:layout=standard", "lora:rank=4", *BESIDE],
    "dylora": ["nf4:layout=standard", "dylora:rank=4", *BESIDE],
    "side": ["nf4:layout=standard", "side:reduction=4", *BESIDE],
    "int8": ["int8", "lora:rank=4"],
}


def tiny(*techniques: str) -> nn.Module:
    """A llama of two blocks with the techniques."""
    model = make("llama")
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    return tightfit.apply(model, techniques)


def rows() -> list[dict[str, Tensor]]:
    """Four rows of 24 tokens, of which unequally many count, and a column that no model takes."""
    tokens = ids((4, 24), 90)
    counts = torch.arange(24)[None] >= torch.tensor([[2], [20], [9], [15]])
    labels = torch.where(counts, tokens, -100)
    return [{"input_ids": tokens[at], "labels": labels[at], "note": torch.tensor(at)} for at in range(4)]


def train(model: nn.Module, folder: Path, resume: str | None = None, **others: Any) -> list[float]:
    """A short run; the losses by step."""
    kept = {name: others.pop(name) for name in ("callbacks", "optimizers", "eval_dataset") if name in others}
    usual = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
    }
    quiet = {"logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(folder), **{**usual, **quiet, **others})
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), **kept)
    trainer.train(resume_from_checkpoint=resume)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def frozen_bits(model: nn.Module) -> dict[str, bytes]:
    """Everything that does not learn, byte by byte."""
    tensors = {name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()] if not tensor.requires_grad}
    return {name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("way", WAYS)
def test_it_learns_and_leaves_the_base_alone(way, tmp_path):
    model = tiny(*WAYS[way])
    before = frozen_bits(model)
    losses = train(model, tmp_path, callbacks=[PolicyCallback()], max_steps=10)
    assert len(losses) == 10
    assert losses[-1] < 0.99 * losses[0]
    assert frozen_bits(model) == before and len(before) > 20


@pytest.mark.parametrize("way", ["lora", "dylora", "side"])
def test_what_was_learned_is_saved_and_loaded(way, tmp_path):
    """Beside a base made anew, through tightfit's own files: the same logits."""
    model = tiny(*WAYS[way])
    base = model(input_ids=ids((2, 9), 90)).logits
    train(model, tmp_path / "run", callbacks=[PolicyCallback()])
    name, settings = tightfit.catalog.parse(WAYS[way][1])
    save_adapter(model, {name: settings}, tmp_path / "adapter", {"base": "tiny", "digest": ""})
    again = tiny(*WAYS[way])
    load_adapter(again, read_adapter(tmp_path / "adapter"))
    with torch.no_grad():
        expected, found = (one.eval()(input_ids=ids((2, 9), 90)).logits for one in (model, again))
    assert torch.equal(found, expected)
    assert not torch.allclose(found, base, atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_gradients_are_those_of_the_whole_batch(checkpointing, tmp_path):
    """Against PyTorch alone: whole logits, all four rows at once, divided by all their targets. `Trainer` takes one row at a time."""
    model = tiny("nf4:layout=standard", "lora:rank=4")
    plain = copy.deepcopy(model)
    tightfit.apply(model, BESIDE)
    options = {"gradient_checkpointing": checkpointing, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "max_steps": 3}
    losses = train(model, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    optimizer = torch.optim.SGD([parameter for parameter in plain.parameters() if parameter.requires_grad], lr=0.05)
    tokens, labels = (torch.stack([row[name] for row in rows()]) for name in ("input_ids", "labels"))
    expected = []
    for _ in range(3):
        logits = plain.train()(input_ids=tokens).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[2] < losses[0]
    found = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["lora", "side"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_trainers_own_checkpointing_changes_nothing(way, reentrant, tmp_path):
    """With or without `recompute`; the reentrant kind wants inputs that require gradients, as transformers offers."""
    techniques = WAYS[way]
    torch.manual_seed(0)
    expected = train(tiny(*techniques), tmp_path / "plain", max_steps=2)
    for chosen in (techniques, [one for one in techniques if one != "recompute"]):
        torch.manual_seed(0)
        model = tiny(*chosen)
        if reentrant:
            model.enable_input_require_grads()
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}, "max_steps": 2}
        assert train(model, tmp_path / "again", **options) == pytest.approx(expected, rel=1e-5)


def test_evaluation_gives_the_loss(tmp_path):
    """The model's own, with nothing in place of logits."""
    model = tiny(*WAYS["lora"])
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    found = Trainer(model=model, args=arguments, eval_dataset=rows()).evaluate()["eval_loss"]
    assert found == pytest.approx(
        steps.loss_of(model, {name: torch.stack([row[name] for row in rows()]) for name in ("input_ids", "labels")}).item()
    )


def test_a_rank_is_drawn_for_each_update(tmp_path):
    """All micro-batches of an update run at its rank, and evaluation at the largest."""
    model = tiny("dylora:rank=16", *BESIDE)
    seen: list[tuple[bool, int]] = []
    model.register_forward_pre_hook(lambda owner, _args: seen.append((owner.training, owner.rank_draw.nesting.rank)))
    options = {"eval_dataset": rows(), "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 4}
    train(model, tmp_path, callbacks=[PolicyCallback()], per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    drawn = [Random(f"0 {step}").randint(1, 16) for step in range(6)]
    assert len(set(drawn)) > 3
    assert [rank for training, rank in seen if training] == [rank for rank in drawn for _ in range(2)]
    assert [rank for training, rank in seen if not training] == [16, 16]
    assert model.rank_draw.nesting.rank == 16


def test_parameters_with_a_pace_of_their_own(tmp_path):
    """`Trainer` takes the optimizer whose groups `steps.make_optimizer` makes."""
    model = tiny(*WAYS["side"])
    optimizer = steps.make_optimizer(model, learning_rate=1e-2)
    assert len(optimizer.param_groups) > 1
    losses = train(model, tmp_path, optimizers=(optimizer, None), max_steps=10)
    assert losses[-1] < losses[0]


def test_the_trainers_own_checkpoints_resume(tmp_path):
    """To the bit; they hold the frozen base too, as `Trainer` knows no better. Ranks are drawn on from the step that comes next."""
    whole = train(tiny(*WAYS["dylora"]), tmp_path, callbacks=[PolicyCallback()], save_strategy="steps", save_steps=3)
    torch.manual_seed(9)
    rest = train(tiny(*WAYS["dylora"]), tmp_path / "rest", str(tmp_path / "checkpoint-3"), callbacks=[PolicyCallback()])
    assert rest == whole and len(rest) == 6
