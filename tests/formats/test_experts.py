"""Experts: against transformers' own module with the decoded weights, its gradients, what is kept, fake tensors, and the swap."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DeepseekV4Config, GptOssConfig, MixtralConfig, NemotronHConfig
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from tightfit.contracts import Absorbs
from tightfit.formats import codec as codecs
from tightfit.formats import experts as experts_room
from tightfit.formats.experts import QuantizedExperts, swap_experts
from tightfit.formats.int8 import Int8Codec
from tightfit.formats.nf4 import NF4Codec
from tightfit.rehearse.fake import empty_like_on_cpu, materialize
from tightfit.terms.errors import TightfitError

HIDDEN, WIDTH, EXPERTS, CHOICES = 64, 96, 4, 2
CODECS = [Int8Codec(), NF4Codec(), NF4Codec("standard", False), NF4Codec("packed")]
FAMILIES = {
    "plain": lambda: MixtralExperts(MixtralConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS)),
    "transposed, biases, own gate": lambda: GptOssExperts(
        GptOssConfig(hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS)
    ),
    "own gate": lambda: DeepseekV4Experts(
        DeepseekV4Config(hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, num_hidden_layers=1)
    ),
    "no gate": lambda: NemotronHExperts(
        NemotronHConfig(hidden_size=HIDDEN, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, moe_latent_size=None)
    ),
}
every_codec = pytest.mark.parametrize("codec", CODECS, ids=str)


def dense_of(family: str = "plain", dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' module in its eager implementation, with random weights."""
    torch.manual_seed(0)
    module = FAMILIES[family]()
    module.config._experts_implementation = "eager"
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module.to(dtype)


def quantized(dense: nn.Module, codec) -> QuantizedExperts:
    """The encoded module, filled parameter by parameter."""
    module = QuantizedExperts(dense, codec)
    for name, parameter in dense.named_parameters():
        module.absorb(name, parameter.detach())
    return module


def decoded_into(dense: nn.Module, module: QuantizedExperts) -> nn.Module:
    """`dense` with the weights that `module` really holds."""
    for name in module.matrices:
        stack = torch.stack([module.dequantize(name, expert) for expert in range(module.num_experts)])
        dense.get_parameter(name).data.copy_(stack.transpose(1, 2) if module.is_transposed else stack)
    return dense


def routed(tokens: int, number: int = EXPERTS, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, distinct choices and weights of the router."""
    index = torch.stack([torch.randperm(number)[:CHOICES] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN, dtype=dtype), index, torch.rand(tokens, CHOICES)


@every_codec
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("small_groups", [False, True])
def test_equal_to_transformers_with_the_decoded_weights(codec, family, small_groups, monkeypatch) -> None:
    if small_groups:
        monkeypatch.setattr(experts_room, "TOKENS", 7)
        monkeypatch.setitem(codecs.SLICE_BYTES, "cpu", 32 * HIDDEN * 4)
    dense = dense_of(family)
    module = quantized(dense, codec)
    reference = decoded_into(dense, module)
    hidden, index, weights = routed(40)
    ours, theirs = (hidden.clone().requires_grad_(), weights.clone().requires_grad_()), (hidden.requires_grad_(), weights.requires_grad_())
    y, expected = module(ours[0], index, ours[1]), reference(theirs[0], index, theirs[1])
    bound = 0.02 if "packed" in str(codec) else 1e-5  # the packed kernel computes in bfloat16
    torch.testing.assert_close(y, expected, rtol=bound, atol=bound * expected.abs().max().item())
    gradient = torch.randn_like(y)
    y.backward(gradient)
    expected.backward(gradient)
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=bound, atol=bound * its.grad.abs().max().item())


@every_codec
def test_near_the_dense_module_in_bfloat16(codec) -> None:
    dense = dense_of(dtype=torch.bfloat16)
    module, (hidden, index, weights) = quantized(dense, codec), routed(30, dtype=torch.bfloat16)
    y, expected = module(hidden, index, weights), dense(hidden, index, weights)
    assert y.dtype == torch.bfloat16
    assert (y - expected).float().norm() / expected.float().norm() < (0.03 if isinstance(codec, Int8Codec) else 0.3)
    assert isinstance(module, Absorbs)


def test_choices_beyond_the_last_expert_are_nobodys() -> None:
    dense = dense_of()
    module, (hidden, index, weights) = quantized(dense, Int8Codec()), routed(10)
    reference = decoded_into(dense, module)
    index[3, 0], index[5] = EXPERTS, EXPERTS
    y = module(hidden, index, weights)
    torch.testing.assert_close(y, reference(hidden, index, weights), rtol=1e-5, atol=1e-5)
    assert torch.equal(y[5], torch.zeros(HIDDEN)) and y[3].any()


@every_codec
def test_bytes_shrink_and_are_the_same_on_meta(codec) -> None:
    with torch.device("meta"):
        big = MixtralExperts(MixtralConfig(hidden_size=512, intermediate_size=1024, num_local_experts=8))
    module = QuantizedExperts(big, codec)
    assert [name for name, _ in module.named_parameters()] == ["gate_up_proj", "down_proj"]
    bits = sum(tensor.nbytes for tensor in module.stored) * 8 / sum(parameter.numel() for parameter in big.parameters())
    assert bits < (8.05 if isinstance(codec, Int8Codec) else 4.51)
    small, meta = quantized(dense_of(), codec), QuantizedExperts(dense_of(), codec)
    described = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in meta.state_dict().items()]
    assert described == [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in small.state_dict().items()]
    assert all(tensor.is_meta for tensor in meta.state_dict().values()) and not any(t.is_meta for t in small.state_dict().values())


@every_codec
def test_expert_by_expert_is_the_same_as_fused(codec) -> None:
    dense = dense_of("transposed, biases, own gate")
    whole, one_by_one = quantized(dense, codec), QuantizedExperts(dense, codec)
    for name in one_by_one.matrices:
        for expert in (2, 0, 3, 1):
            one_by_one.absorb_expert(name, expert, dense.get_parameter(name)[expert].detach())
    for mine, its in zip(one_by_one.stored, whole.stored, strict=True):
        assert torch.equal(mine, its)


@every_codec
def test_backward_keeps_the_inputs_and_the_stored_tensors_only(codec) -> None:
    module, (hidden, index, weights) = quantized(dense_of(), codec), routed(40)
    hidden.requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(hidden, index, weights)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in [hidden, index, weights, *module.stored]}


@every_codec
@pytest.mark.parametrize("tokens", [1, 700])
def test_fake_tensors_run_forward_and_backward(codec, tokens) -> None:
    block = nn.Sequential(QuantizedExperts(dense_of("transposed, biases, own gate"), codec))
    with FakeTensorMode():
        materialize(block, empty_like_on_cpu)
        hidden = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        weights = torch.empty(tokens, CHOICES, requires_grad=True)
        y = block[0](hidden, torch.empty(tokens, CHOICES, dtype=torch.long), weights)
        assert y.shape == hidden.shape and y.dtype == torch.bfloat16
        y.sum().backward()
        assert hidden.grad.shape == hidden.shape and weights.grad.shape == weights.shape


@every_codec
def test_autocast_and_change_of_dtype(codec) -> None:
    module, (hidden, index, weights) = quantized(dense_of("transposed, biases, own gate"), codec), routed(20)
    expected = module(hidden, index, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(hidden, index, weights)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.1)
    before = [tensor.clone() for tensor in module.stored]
    module.half()
    assert module.gate_up_proj_bias.dtype == torch.float16
    assert all(old.dtype == new.dtype and torch.equal(old, new) for old, new in zip(before, module.stored, strict=True))


def test_wrong_tensors_are_refused() -> None:
    module = QuantizedExperts(dense_of(), Int8Codec())
    with pytest.raises(TightfitError, match=r"down_proj has the shape \[4, 96, 64\], the model wants \[4, 64, 96\]"):
        module.absorb("down_proj", torch.zeros(4, 96, 64))
    with pytest.raises(TightfitError, match=r"down_proj has the shape \[3, 64, 96\], the model wants \[4, 64, 96\]"):
        module.absorb("down_proj", torch.zeros(3, 64, 96))
    with pytest.raises(TightfitError, match=r"^weight holds NaN$"):
        module.absorb("down_proj", torch.full((4, 64, 96), float("nan")))


class Strange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 8))


def test_swap_replaces_known_experts_and_refuses_unknown_ones() -> None:
    block = nn.ModuleDict({"moe": dense_of(), "conv": nn.Conv1d(4, 4, 2)})
    expected = block["moe"](*(routing := routed(5)))
    assert swap_experts([("layers.0", block)], Int8Codec(), where="nothing") == []
    assert swap_experts([("layers.0", block)], Int8Codec(), where=r"down_proj") == ["layers.0.moe"]
    torch.testing.assert_close(block["moe"](*routing), expected, rtol=0.05, atol=0.05)
    assert swap_experts([("layers.0", block)], Int8Codec()) == []
    odd = nn.ModuleDict({"experts": Strange()})
    with pytest.raises(TightfitError, match=r"`layers.3.experts` \(Strange\) holds fused experts that cannot be quantized here"):
        swap_experts([("layers.3", odd)], Int8Codec())
    assert swap_experts([("layers.3", odd)], Int8Codec(), where="attention") == []
