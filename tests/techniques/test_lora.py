"""lora: starts at the base model, trains only its adapters over any base, and is PEFT's own file and layers."""

import copy

import pytest
import torch
from families import make

import tightfit
from tightfit import catalog, steps
from tightfit.describe.skeleton import meta_copy
from tightfit.rehearse.fake import inputs_for
from tightfit.techniques.lora import LoRA, adapted_layers
from tightfit.terms.errors import TightfitError
from tightfit.terms.workload import Workload

FAMILIES = ["llama", "gpt2", "bloom", "t5", "bert", "qwen3-moe"]
BASES = [[], ["int8"], ["nf4:layout=standard"]]


def batch(model):
    """Two rows, the same in every call."""
    return inputs_for(model, Workload("tune", 2, 16), lambda shape, high: torch.arange(32).view(2, 16) % min(high, 90))


def fill(model):
    """Adapters that do something: B is zero at first."""
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapted_layers(model):
            layer.lora_B["default"].weight.normal_(std=0.05, generator=numbers)
            layer.lora_A["default"].weight.normal_(std=0.05, generator=numbers)


@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_tuning_starts_at_the_base_and_moves_only_adapters(family, base):
    model = tightfit.apply(make(family).eval(), base)
    expected = steps.loss_of(model, batch(model))
    frozen = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tightfit.apply(model, ["lora:rank=4"])
    torch.testing.assert_close(steps.loss_of(model, batch(model)), expected, rtol=1e-6, atol=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_A.default" in name or "lora_B.default" in name for name in trained)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    losses = [steps.train_step(model, batch(model), optimizer).item() for _ in range(6)]
    assert losses[-1] < losses[0]
    held = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters() if name not in trained}
    assert held.keys() == frozen.keys()
    assert all(torch.equal(held[name], frozen[name]) for name in frozen)


def test_the_sum_is_the_papers():
    """`base(x) + alpha / rank · B A x`, by hand, forward and the gradients of A and B."""
    torch.manual_seed(0)
    model = make("llama")
    block = model.model.layers[0].self_attn
    size = block.q_proj.in_features
    block.q_proj = torch.nn.Linear(size, block.q_proj.out_features, bias=False).float()
    weight = block.q_proj.weight.detach().clone()
    LoRA(rank=3, alpha=6.0, where=r"layers\.0\.self_attn\.q_proj").apply(model)
    fill(model)
    (adapted,) = adapted_layers(model)
    a, b = (part["default"].weight.detach().clone().requires_grad_() for part in (adapted.lora_A, adapted.lora_B))
    x = torch.randn(5, size)
    expected = x @ weight.T + 2.0 * (x @ a.T) @ b.T
    found = adapted(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(adapted.lora_A["default"].weight.grad, a.grad)
    torch.testing.assert_close(adapted.lora_B["default"].weight.grad, b.grad)


def test_plain_peft_loads_the_adapter(tmp_path):
    """Saved as PEFT's own file, loaded by PEFT over the dense model: equal logits."""
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file

    plain = make("llama").eval()
    model = tightfit.apply(copy.deepcopy(plain), ["lora:rank=4,alpha=8"])
    fill(model)
    state = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    LoraConfig(r=4, lora_alpha=8, target_modules=targets).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not torch.equal(loaded(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_on_paper_it_has_the_same_parameters():
    live = make("llama")
    paper = meta_copy(live)
    for model in (live, paper):
        for name in ("int8", "lora"):
            catalog.make(name, {}).apply(model)
    shapes = [
        {name: (tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in model.named_parameters()} for model in (live, paper)
    ]
    assert shapes[0] == shapes[1]
    assert all(parameter.is_meta for parameter in paper.parameters())


@pytest.mark.parametrize(("settings", "said"), [({"rank": 0}, "at least 1"), ({"where": "nothing"}, "no linear layer")])
def test_what_it_does_not_take(settings, said):
    with pytest.raises(TightfitError, match=said) as caught:
        LoRA(**settings).apply(make("llama"))
    assert caught.value.hint
