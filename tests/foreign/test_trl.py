"""TRL's `SFTTrainer` trains what `tightfit.apply` returns, from conversations or text, with its metrics."""

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from families import make
from torch import nn

import tightfit
from tightfit.runtime.callback import PolicyCallback

datasets = pytest.importorskip("datasets", reason="TRL takes its data from `datasets`")
trl = pytest.importorskip("trl", reason="TRL is not installed")

BESIDE = ["recompute", "chunked_loss:tokens=13"]
WAYS = {
    "lora": ["nf4:layout=standard", "lora:rank=4", *BESIDE],
    "dylora": ["nf4:layout=standard", "dylora:rank=4", *BESIDE],
    "side": ["nf4:layout=standard", "side:reduction=4", *BESIDE],
    "without chunked_loss": ["int8", "lora:rank=4"],
}
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<end>{% endfor %}"
ASKED = ["what fits?", "how much?", "why so small?", "and then?"]
MESSAGES = [
    [{"role": "user", "content": asked}, {"role": "assistant", "content": "a model fits " * (1 + at)}] for at, asked in enumerate(ASKED)
]


def tokenizer() -> Any:
    """Each byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {sign: at for at, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>", chat_template=TEMPLATE)


def tiny(*techniques: str) -> nn.Module:
    """A llama of two blocks with the techniques."""
    model = make("llama")
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    return tightfit.apply(model, techniques)


def trainer(model: nn.Module, folder: Path, data: Any, callbacks: Any = None, **others: Any) -> Any:
    """A short run on the whole of `data` at each step."""
    usual = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 5e-2, "lr_scheduler_type": "constant"}
    quiet = {"logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "bf16": False}
    settings = trl.SFTConfig(output_dir=str(folder), max_length=64, **{**usual, **quiet, **others})
    return trl.SFTTrainer(model, settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer(), callbacks=callbacks)


def frozen_bits(model: nn.Module) -> dict[str, bytes]:
    """Everything that does not learn, byte by byte."""
    tensors = {name: tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()] if not tensor.requires_grad}
    return {name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("way", WAYS)
def test_conversations(way, tmp_path):
    """TRL has the gradient checkpointing of transformers on, beside `recompute` here; its loss, entropy and accuracy are all there."""
    model = tiny(*WAYS[way])
    before = frozen_bits(model)
    running = trainer(model, tmp_path, datasets.Dataset.from_dict({"messages": MESSAGES}), [PolicyCallback()])
    running.train()
    lines = [line for line in running.state.log_history if "loss" in line]
    assert len(lines) == 8
    assert lines[-1]["loss"] < 0.99 * lines[0]["loss"]
    assert all(line["entropy"] > 0 and 0 <= line["mean_token_accuracy"] <= 1 for line in lines)
    assert frozen_bits(model) == before and len(before) > 10
    assert running.evaluate()["eval_loss"] < lines[0]["loss"]


def test_its_loss_is_the_models_own(tmp_path):
    """TRL goes past the model's head with slices of its own, without and with `chunked_loss`: the same number, of text this time."""
    data = datasets.Dataset.from_dict({"text": ["a model fits", "inside a budget, for it was measured", "so", "four rows of text"]})
    model = tiny(*WAYS["lora"])
    running = trainer(model, tmp_path, data)
    (batch,) = running.get_eval_dataloader()
    assert (batch["labels"] == -100).any()
    with torch.no_grad():
        whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        own = model(**batch, fused_lm_head=False)
    expected = nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).item()
    assert whole.shape[-1] == model.config.vocab_size and own.logits.shape[-1] == 0
    assert running.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert own.loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_rank_is_drawn_for_each_update(tmp_path):
    model = tiny("dylora:rank=16", *BESIDE)
    seen: list[int] = []
    model.model.register_forward_pre_hook(lambda *_: seen.append(model.rank_draw.nesting.rank))
    trainer(model, tmp_path, datasets.Dataset.from_dict({"messages": MESSAGES}), [PolicyCallback()], max_steps=5).train()
    assert seen == [Random(f"0 {step}").randint(1, 16) for step in range(5)]
    assert len(set(seen)) > 2
