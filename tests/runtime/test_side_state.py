"""Side state: what goes through one safetensors file comes back beside a fresh base, and what does not fit changes nothing."""

import json

import pytest
import torch
from families import ids, make
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig

from tightfit.runtime.side_state import load_side, side_config, side_state
from tightfit.techniques.side import Side, activate
from tightfit.terms.errors import TightfitError


def tuned(model: nn.Module, **settings: object) -> nn.Module:
    """`model` with a side network and a head as if they had learned something."""
    Side(**{"reduction": 4, **settings}).apply(model)
    torch.seed()
    with torch.no_grad():
        for tensor in side_state(model, settings.get("name", "default")).values():
            tensor += 0.3 * torch.randn_like(tensor)
    return model


def classifier() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(BertConfig(**sizes)).eval()


@pytest.mark.parametrize("fresh", [lambda: make("llama"), lambda: make("opt"), classifier], ids=["llama", "opt", "classifier"])
def test_through_a_file_and_back(fresh, tmp_path):
    model, tokens = tuned(fresh(), downsample="lora", rank=4), ids((2, 9), 99)
    save_file(side_state(model), tmp_path / "side.safetensors", {"side": json.dumps(side_config(model))})
    with safe_open(tmp_path / "side.safetensors", "pt") as file:
        config, state = json.loads(file.metadata()["side"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    other = fresh()
    untouched = other(input_ids=tokens).logits
    load_side(other, config, state)
    expected = model(input_ids=tokens).logits
    assert torch.equal(other(input_ids=tokens).logits, expected) and not torch.equal(untouched, expected)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in other.named_parameters() if parameter.requires_grad} == trained
    assert sum(tensor.numel() for tensor in state.values()) == sum(dict(model.named_parameters())[name].numel() for name in trained)


def test_under_another_name_beside_the_first():
    model, other, tokens = tuned(make("llama")), tuned(make("llama"), reduction=8, name="second"), ids((2, 9), 384)
    expected, kept = model(input_ids=tokens).logits, other(input_ids=tokens).logits
    load_side(other, side_config(model), side_state(model), "third")
    assert list(other.side) == ["second", "third"]
    assert torch.equal(other(input_ids=tokens).logits, expected)
    activate(other, "second")
    assert torch.equal(other(input_ids=tokens).logits, kept)


def test_once_more_into_the_same_side():
    model, other, tokens = tuned(make("llama")), tuned(make("llama")), ids((2, 9), 384)
    assert not torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)
    load_side(other, side_config(model), side_state(model))
    assert torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    model = tuned(make("llama"))
    config, state = side_config(model), side_state(model)
    cases = [
        (make("bloom"), config, state, "made for another model: architecture LlamaForCausalLM in place of BloomForCausalLM"),
        (tuned(make("llama"), reduction=8), config, state, "other settings than the side network `default`"),
        (make("llama"), config, {name: tensor for name, tensor in state.items() if name != "side.alpha"}, "`side.alpha`"),
        (make("llama"), config, state | {"side.gamma": torch.zeros(5)}, "`side.gamma`"),
        (make("llama"), config, state | {"side.zeta": torch.zeros(5)}, "`side.zeta`"),
    ]
    for base, settings, tensors, line in cases:
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        with pytest.raises(TightfitError, match=line) as fault:
            load_side(base, settings, tensors)
        assert fault.value.hint
        after = base.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())
