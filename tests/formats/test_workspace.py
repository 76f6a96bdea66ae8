"""Workspace: the bytes of the tables against what the same computation holds under the meter, and operations against products."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from tightfit.formats import codec as codecs
from tightfit.formats import experts as experts_room
from tightfit.formats.codec import as_if_on
from tightfit.formats.experts import QuantizedExperts, backward_experts, forward_experts
from tightfit.formats.int8 import Int8Codec, int8pack_bytes
from tightfit.formats.linear import QuantizedLinear
from tightfit.formats.nf4 import NF4Codec
from tightfit.formats.workspace import TOUCHED, experts_bytes
from tightfit.rehearse.fake import empty_like_on_cpu, materialize
from tightfit.rehearse.meter import Meter

HIDDEN, WIDTH, EXPERTS, CHOICES = 256, 384, 4, 2
CODECS = [Int8Codec(), NF4Codec(), NF4Codec("packed")]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=str)


FAMILIES = {
    "plain": lambda: MixtralExperts(MixtralConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS)),
    "own gate": lambda: GptOssExperts(GptOssConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS)),
}


def quantized(codec, dtype: torch.dtype = torch.float32, family: str = "plain") -> QuantizedExperts:
    dense = FAMILIES[family]().to(dtype)
    module = QuantizedExperts(dense, codec)
    for name, parameter in dense.named_parameters():
        module.absorb(name, torch.randn_like(parameter))
    return module


@every_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 64, 1100])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_hold_at_most_what_the_table_says_and_not_much_less(codec, dtype, tokens, backward, family, monkeypatch) -> None:
    """All tokens choose one expert, the worst case; the second choice is nobody's."""
    monkeypatch.setitem(codecs.SLICE_BYTES, "cpu", 128 * HIDDEN * 4)
    module = quantized(codec, dtype, family)
    hidden, grad, weights = torch.randn(tokens, HIDDEN, dtype=dtype), torch.randn(tokens, HIDDEN, dtype=dtype), torch.rand(tokens, CHOICES)
    index = torch.tensor([[1, EXPERTS]]).repeat(tokens, 1)
    meter = Meter()
    meter.adopt([hidden, grad, weights, index, *module.stored], "weights")
    with meter:
        if backward:
            results = backward_experts(module, grad, hidden, index, weights, module.stored)
        else:
            results = (forward_experts(module, hidden, index, weights, module.stored),)
    held = max(kinds.get("activations", 0) for kinds in meter.phases.values()) - sum(result.nbytes for result in results)
    said = experts_bytes(module, "cpu", dtype, tokens, CHOICES, backward)
    assert said * 0.8 <= held <= said


@every_codec
def test_the_meter_adds_the_workspace_of_experts(codec) -> None:
    block = nn.Sequential(QuantizedExperts(MixtralExperts(MixtralConfig(hidden_size=64, intermediate_size=64, num_local_experts=4)), codec))
    with FakeTensorMode():
        materialize(block, empty_like_on_cpu)
        meter = Meter()
        meter.adopt(block[0].stored, "weights")
        hidden, index = torch.empty(40, 64, requires_grad=True), torch.empty(40, 2, dtype=torch.long)
        with meter:
            y = block[0](hidden, index, torch.empty(40, 2))
            meter.enter("backward")
            y.sum().backward()
    said = [experts_bytes(block[0], "cpu", torch.float32, 40, 2, backward) for backward in (False, True)]
    assert [meter.phases[phase]["workspace"] for phase in ("start", "backward")] == said
    assert said[1] > said[0] > 0


def test_operations_of_experts_are_those_of_the_chosen_products() -> None:
    module = quantized(Int8Codec())
    hidden, index = torch.randn(10, HIDDEN, requires_grad=True), torch.randint(0, EXPERTS, (10, CHOICES))
    one_expert = 3 * HIDDEN * WIDTH
    with FlopCounterMode(display=False) as counter:
        y = module(hidden, index, torch.rand(10, CHOICES))
    assert counter.get_total_flops() == 2 * 10 * CHOICES * one_expert
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 10 * CHOICES * (2 * 2 * HIDDEN * WIDTH + HIDDEN * WIDTH)


def test_experts_that_no_token_chooses_are_not_touched() -> None:
    module = quantized(Int8Codec())
    hidden, weights = torch.randn(1, HIDDEN), torch.rand(1, 1)
    args = (hidden, torch.tensor([[2]]), weights, module.stored, experts_room.number_of(module))
    touched = TOUCHED[torch.ops.tightfit.experts.default](args, {})
    stored = sum(tensor.nbytes for tensor in module.stored)
    assert touched == stored // EXPERTS + hidden.nbytes + weights.nbytes + 8


@pytest.mark.parametrize("codec", [Int8Codec(), NF4Codec(), NF4Codec("packed")])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tokens", [2, 400])
def test_every_kernel_counts_its_operations(codec, device, tokens) -> None:
    layer = nn.Sequential(QuantizedLinear(128, 64, codec, bias=False, dtype=torch.bfloat16))
    with FakeTensorMode(), as_if_on(device), FlopCounterMode(display=False) as counter:
        materialize(layer, empty_like_on_cpu)
        layer(torch.empty(tokens, 128, dtype=torch.bfloat16))
    assert counter.get_total_flops() == 2 * tokens * 128 * 64


def test_copies_inside_the_cuda_kernel_are_workspace() -> None:
    layer = nn.Sequential(QuantizedLinear(128, 64, Int8Codec(), bias=False, dtype=torch.bfloat16))
    with FakeTensorMode(), as_if_on("cuda"):
        materialize(layer, empty_like_on_cpu)
        meter = Meter()
        with meter:
            layer(torch.empty(2, 128, dtype=torch.bfloat16))
    assert meter.phases["start"]["workspace"] == int8pack_bytes(2, (64, 128), torch.bfloat16) > 0
