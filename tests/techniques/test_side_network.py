"""Side network: what it keeps of itself, through one safetensors file and beside a base again; what does not fit changes nothing."""

import json

import pytest
import torch
from families import ids, make
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig

import tightfit
from tightfit import catalog
from tightfit.contracts import Learns, Paced
from tightfit.steps import train_step
from tightfit.techniques.side import Side, activate, load_side
from tightfit.terms.errors import TightfitError


def tuned(model: nn.Module, **settings: object) -> nn.Module:
    """`model` with a side network and a head as if they had learned something."""
    side = Side(**{"reduction": 4, **settings})
    side.apply(model)
    torch.seed()
    with torch.no_grad():
        for tensor in side.learned_state(model).values():
            tensor += 0.3 * torch.randn_like(tensor)
    return model


def kept(model: nn.Module, name: str = "default") -> tuple[dict, dict]:
    """Config and tensors, as the technique gives them."""
    settings = model.side[name].settings
    return settings.learned_config(model), settings.learned_state(model)


def classifier() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(BertConfig(**sizes)).eval()


@pytest.mark.parametrize("fresh", [lambda: make("llama"), lambda: make("opt"), classifier], ids=["llama", "opt", "classifier"])
def test_through_a_file_and_back(fresh, tmp_path):
    model, tokens = tuned(fresh(), downsample="lora", rank=4), ids((2, 9), 99)
    config, state = kept(model)
    save_file(state, tmp_path / "side.safetensors", {"side": json.dumps(config)})
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


@pytest.mark.parametrize("name", ["default", "french"])
def test_into_a_model_on_which_it_was_applied(name):
    model, other, tokens = tuned(make("llama")), make("llama"), ids((2, 9), 384)
    here = Side(reduction=4, name=name, mix_rate=3.0)
    assert isinstance(here, Learns) and here.learned_state(other) == {}
    here.apply(other)
    assert not torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)
    here.load_learned(other, *kept(model))
    assert torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert list(other.side) == [name]


def test_first_values_are_no_matter_when_it_is_loaded():
    model, other, tokens = tuned(make("llama"), reduction=1, downsample="linear", init="base"), make("llama"), ids((2, 9), 384)
    Side(reduction=1, downsample="linear").apply(other)
    Side(reduction=1, downsample="linear").load_learned(other, *kept(model))
    assert torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_under_another_name_beside_the_first():
    model, other, tokens = tuned(make("llama")), tuned(make("llama"), reduction=8, name="second"), ids((2, 9), 384)
    expected, before = model(input_ids=tokens).logits, other(input_ids=tokens).logits
    load_side(other, *kept(model), "third")
    assert list(other.side) == ["second", "third"]
    assert torch.equal(other(input_ids=tokens).logits, expected)
    activate(other, "second")
    assert torch.equal(other(input_ids=tokens).logits, before)


def test_once_more_into_the_same_side():
    model, other, tokens = tuned(make("llama")), tuned(make("llama")), ids((2, 9), 384)
    assert not torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)
    load_side(other, *kept(model))
    assert torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    model = tuned(make("llama"))
    config, state = kept(model)
    cases = [
        (make("bloom"), config, state, "made for another model: architecture LlamaForCausalLM in place of BloomForCausalLM"),
        (tuned(make("llama"), reduction=8), config, state, "other settings than the side network `default`"),
        (make("llama"), {name: value for name, value in config.items() if name != "rank"}, state, "lacks `rank`"),
        (make("llama"), config, {name: tensor for name, tensor in state.items() if name != "side.alpha"}, "`side.alpha`"),
        (make("llama"), config, state | {"side.gamma": torch.zeros(5)}, "`side.gamma`"),
        (make("llama"), config, state | {"side.zeta": torch.zeros(5)}, "`side.zeta`"),
        (tuned(make("llama")), config, state | {"side.gamma": torch.full((4,), torch.nan)}, "`side.gamma` holds NaN"),
    ]
    for base, settings, tensors, line in cases:
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        with pytest.raises(TightfitError, match=line) as fault:
            load_side(base, settings, tensors)
        assert fault.value.hint
        after = base.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "names", [("lora:rank=2", "side:reduction=4"), ("dylora:rank=2", "side:reduction=4"), ("lora", "dylora"), ("lora", "lora")]
)
@pytest.mark.parametrize("order", [1, -1])
def test_two_ways_of_tuning_do_not_go_together(names, order):
    first, second = names[::order]
    model = tightfit.apply(make("llama"), [first])
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(TightfitError, match=rf"`{second.partition(':')[0]}` cannot go with the adapters") as fault:
        catalog.make(*catalog.parse(second)).apply(model)
    assert fault.value.hint
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_mix_and_gates_learn_faster_as_the_setting_says():
    """Their movement in the first step, from a gradient of any size, is Adam's: the learning rate times the factor."""
    model, tokens = make("llama"), ids((2, 9), 384)
    Side(reduction=4, mix_rate=7.0).apply(model)
    side = model.side.default
    assert isinstance(side, Paced) and dict(side.rate_factors) == {"alpha": 7.0, "gamma": 7.0}
    own = dict(side.named_parameters(recurse=False))
    assert own.keys() == side.rate_factors.keys()
    optimizer = torch.optim.Adam([{"params": [own[name]], "lr": 1e-3 * factor} for name, factor in side.rate_factors.items()])
    train_step(model.train(), {"input_ids": tokens, "labels": tokens}, optimizer)
    assert abs(side.alpha.item() - 1.0) == pytest.approx(7e-3, rel=1e-3)
