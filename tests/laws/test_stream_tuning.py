"""Law 3, tuning: an adapter's gradients over a base that streams from disk are those over a base that stays, bit for bit."""

import pytest
import torch
from families import ids
from transformers import LlamaConfig, LlamaForCausalLM

from tightfit import steps
from tightfit.describe.source import describe
from tightfit.rehearse.fake import inputs_for
from tightfit.runtime.build import build
from tightfit.techniques.lora import adapted_layers
from tightfit.terms.budget import Budget
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload

TUNE = Workload("tune", 1, 24)


def gradients(folder: str, techniques: dict[str, dict[str, object]], streamed: tuple[int, ...], blocks: int) -> dict[str, torch.Tensor]:
    """The loss and what the adapters learn in one step. B, zero at first, is made random, and the same in every call."""
    settings = {"lora": {"rank": 4}, "recompute": {}, **techniques} | ({"offload": {"streamed": streamed}} if streamed else {})
    homes = tuple("disk" if position in streamed else "ram" for position in range(blocks))
    plan = Plan(folder, TUNE, Budget(ram=1 << 40), "exact", settings, homes, {"ram": {"weights": 10**6}}, {}, {})
    numbers = torch.Generator().manual_seed(1)
    with build(plan, describe(folder)) as built:
        with torch.no_grad():
            for layer in adapted_layers(built.model):
                layer.lora_A["default"].weight.normal_(std=0.02, generator=numbers)
                layer.lora_B["default"].weight.normal_(std=0.02, generator=numbers)
        assert (built.stream is not None) == bool(streamed)
        loss = steps.loss_of(built.model.train(), inputs_for(built.model, TUNE, ids))
        loss.backward()
        moved = built.stream.traffic().reads if built.stream else 0
        assert moved >= 2 * len(streamed) - 2, "each block comes for its forward pass and for its recomputation, but for those still there"
        return {name: parameter.grad for name, parameter in built.model.named_parameters() if parameter.requires_grad} | {
            "loss": loss.detach()
        }


@pytest.mark.parametrize("techniques", [{}, {"int8": {}}, {"nf4": {"layout": "standard"}}, {"chunked_loss": {"tokens": 8}}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "qwen3-moe"])
def test_gradients_over_a_streamed_base(family, techniques, saved):
    folder, blocks = str(saved(family)), len(describe(str(saved(family))).block_bytes())
    expected = gradients(folder, techniques, (), blocks)
    found = gradients(folder, techniques, tuple(range(1, blocks)), blocks)
    assert found.keys() == expected.keys() and len(found) > 8
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert any(gradient.abs().max() > 0 for name, gradient in found.items() if "lora_A" in name)


def test_at_a_width_of_4096(tmp_path):
    """Four blocks through two slots, so that every slot is used again."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8, vocab_size=128
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    expected = gradients(str(tmp_path), {}, (), 4)
    found = gradients(str(tmp_path), {}, (0, 1, 2, 3), 4)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
