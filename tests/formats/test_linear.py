"""Linear: gradients against the decoded dense weight, what is kept for backward, fake tensors, slots, and the swap."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tightfit.contracts import Absorbs
from tightfit.formats import codec as codecs
from tightfit.formats.image import bind, copy_into, image_of
from tightfit.formats.int8 import Int8Codec
from tightfit.formats.linear import QuantizedLinear, swap_linears
from tightfit.formats.nf4 import NF4Codec
from tightfit.rehearse.fake import empty_like_on_cpu, materialize
from tightfit.terms.errors import TightfitError

CODECS = {
    "int8": Int8Codec(),
    "nf4": NF4Codec(),
    "nf4 single": NF4Codec(double_quantization=False),
    "nf4 packed": NF4Codec("packed"),
}
MAKERS = {name: partial(QuantizedLinear, codec=codec) for name, codec in CODECS.items()}
IN, OUT = 128, 96
NEAR = {"int8": 0.02, "nf4": 0.2, "nf4 single": 0.2, "nf4 packed": 0.2}
every_format = pytest.mark.parametrize("name", MAKERS)


def filled(name: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[QuantizedLinear, nn.Linear]:
    """An encoded layer, and the dense one that it was made from."""
    torch.manual_seed(0)
    dense = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    layer = MAKERS[name](IN, OUT, bias=bias, dtype=dtype)
    layer.absorb("weight", dense.weight.detach())
    if bias:
        layer.absorb("bias", dense.bias.detach())
    return layer, dense


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 300])
def test_forward_is_near_the_dense_layer(name, dtype, tokens) -> None:
    layer, dense = filled(name, dtype)
    x = torch.randn(tokens, IN, dtype=dtype)
    error = (layer(x) - dense(x)).float().norm() / dense(x).float().norm()
    assert 1e-4 < error < NEAR[name]
    assert isinstance(layer, Absorbs)


@every_format
@pytest.mark.parametrize("slices", [False, True])
def test_gradients_equal_those_through_the_decoded_weight(name, slices, monkeypatch) -> None:
    layer, _ = filled(name)
    if slices:
        monkeypatch.setitem(codecs.SLICE_BYTES, "cpu", 32 * IN * 4)
    layer.bias.requires_grad_(True)
    reference = nn.Linear(IN, OUT)
    reference.weight.data, reference.bias.data = layer.dequantize(), layer.bias.detach().clone()
    x = torch.randn(2, 150, IN)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(ours), reference(theirs)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    expected.backward(gradient)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, reference.bias.grad, rtol=1e-5, atol=1e-4)
    assert layer.weight.grad is None


@every_format
def test_backward_keeps_nothing_but_the_stored_tensors(name) -> None:
    layer, _ = filled(name)
    kept: list[torch.Tensor] = []
    x = torch.randn(300, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    stored = {tensor.data_ptr() for tensor in layer.stored}
    assert {tensor.data_ptr() for tensor in kept} == stored
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x.detach())
    assert not kept
    y.sum().backward()
    assert x.grad is not None


@every_format
def test_checkpointing_gives_the_same_gradients(name) -> None:
    layer, _ = filled(name)
    x = torch.randn(4, IN)
    plain, recomputed = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(plain.tanh()).square().sum().backward()
    checkpoint(lambda v: layer(v.tanh()).square(), recomputed, use_reentrant=False).sum().backward()
    assert torch.equal(plain.grad, recomputed.grad)


@every_format
def test_a_backward_that_reaches_the_layer_first_recomputes_its_block(name) -> None:
    """A streamed block is fetched when it is recomputed; a layer that read its weight before that would read another block's."""
    layer, _ = filled(name)
    calls = []

    def block(v: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return layer(v)

    x = torch.randn(4, IN, requires_grad=True)
    y = checkpoint(block, x, use_reentrant=False)
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2


@every_format
def test_autocast(name) -> None:
    layer, _ = filled(name)
    x = torch.randn(3, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


@every_format
def test_inference_mode(name) -> None:
    torch.manual_seed(0)
    layer = MAKERS[name](IN, OUT, bias=False)
    with torch.inference_mode():
        layer.absorb("weight", torch.randn(OUT, IN))
        quiet = layer(torch.ones(1, IN))
    x = torch.ones(1, IN, requires_grad=True)
    assert torch.equal(layer(x).detach(), quiet)
    layer(x).sum().backward()  # weights that were read while generating can still be tuned through


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 300])
def test_fake_tensors_run_forward_and_backward(name, dtype, tokens) -> None:
    layer = nn.Sequential(MAKERS[name](IN, OUT, dtype=dtype))
    with FakeTensorMode():
        materialize(layer, empty_like_on_cpu)
        x = torch.empty(2, tokens, IN, dtype=dtype, requires_grad=True)
        y = layer(x)
        assert y.shape == (2, tokens, OUT) and y.dtype == dtype and y.device.type == "cpu"
        y.sum().backward()
        assert x.grad.shape == x.shape and x.grad.dtype == dtype


@every_format
def test_bytes_on_meta_are_the_bytes_after_absorb(name) -> None:
    meta, (layer, _) = MAKERS[name](IN, OUT), filled(name)
    described = [(key, tuple(tensor.shape), tensor.dtype) for key, tensor in meta.state_dict().items()]
    assert described == [(key, tuple(tensor.shape), tensor.dtype) for key, tensor in layer.state_dict().items()]
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    assert vars(meta).keys() == vars(layer).keys()
    assert not any(tensor.requires_grad for tensor in [*layer.parameters(), *layer.buffers()])


@every_format
def test_forward_reads_only_registered_tensors(name) -> None:
    """The block rests in one slot; then another block's bytes come into it."""
    (layer, _), other = filled(name), MAKERS[name](IN, OUT)
    other.absorb("weight", torch.randn(OUT, IN))
    other.absorb("bias", torch.randn(OUT))
    x = torch.randn(5, IN)
    expected, expected_other = layer(x), other(x)
    image = image_of(layer)
    slots = [torch.zeros(image.slot_bytes, dtype=torch.uint8) for _ in range(2)]
    copy_into(layer, image, slots[0])
    copy_into(other, image, slots[1])
    bind(layer, image, slots[0])
    assert torch.equal(layer(x), expected)
    slots[0].copy_(slots[1])
    assert torch.equal(layer(x), expected_other)


@every_format
def test_absorb_fills_what_is_there_already(name) -> None:
    layer, _ = filled(name)
    before = {key: tensor.data_ptr() for key, tensor in layer.state_dict().items()}
    layer.absorb("weight", torch.ones(OUT, IN))
    assert before == {key: tensor.data_ptr() for key, tensor in layer.state_dict().items()}
    torch.testing.assert_close(layer.dequantize(), torch.ones(OUT, IN), rtol=0.02, atol=0)


@every_format
def test_state_dict_and_copies(name) -> None:
    layer, _ = filled(name)
    x, again = torch.randn(2, IN), MAKERS[name](IN, OUT).to_empty(device="cpu")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@every_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_changing_the_dtype_of_a_model_leaves_the_codes_and_scales(name, dtype) -> None:
    layer, _ = filled(name)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items() if key != "bias"}
    layer.to(dtype)
    assert layer.bias.dtype == dtype
    for key, tensor in before.items():
        assert layer.state_dict()[key].dtype == tensor.dtype and torch.equal(layer.state_dict()[key], tensor)


@every_format
def test_a_weight_that_is_stored_in_out(name) -> None:
    torch.manual_seed(0)
    dense = torch.randn(IN, OUT)
    layer, plain = MAKERS[name](IN, OUT, bias=False, transposed=True), MAKERS[name](IN, OUT, bias=False)
    layer.absorb("weight", dense)
    plain.absorb("weight", dense.t().contiguous())
    assert torch.equal(layer.dequantize(), plain.dequantize())


@every_format
def test_wrong_tensors_are_refused(name) -> None:
    layer = MAKERS[name](IN, OUT)
    with pytest.raises(TightfitError, match=r"weight has the shape \[128, 96\], the model wants \[96, 128\]"):
        layer.absorb("weight", torch.zeros(IN, OUT))
    with pytest.raises(TightfitError, match="bias has the shape"):
        layer.absorb("bias", torch.zeros(IN))
    with pytest.raises(TightfitError, match=r"^weight holds NaN$"):
        layer.absorb("weight", torch.full((OUT, IN), float("nan")))
    assert layer.weight.is_meta  # nothing half-written


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(IN, OUT)
        self.mlp = nn.ModuleDict({"gate": nn.Linear(IN, 4), "gate_proj": nn.Linear(IN, OUT, bias=False)})
        self.attention = nn.MultiheadAttention(IN, 2)
        self.tied = nn.Linear(IN, OUT, bias=False)
        self.again = nn.Linear(IN, OUT, bias=False)
        self.again.weight = self.tied.weight


def swap(model: nn.Module, **settings) -> list[str]:
    return swap_linears(model, [(f"layers.{index}", block) for index, block in enumerate(model["layers"])], Int8Codec(), **settings)


def test_swap_takes_plain_linear_layers_and_leaves_the_rest() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()]), "head": nn.Linear(IN, 5)})
    x, expected = torch.randn(1, IN), model["layers"][1].up(torch.ones(1, IN))
    paths = set(dict(model.named_parameters()))
    assert swap(model) == ["layers.0.up", "layers.0.mlp.gate_proj", "layers.1.up", "layers.1.mlp.gate_proj"]
    assert paths <= set(dict(model.named_parameters()))
    block = model["layers"][1]
    torch.testing.assert_close(block.up(torch.ones(1, IN)), expected, rtol=0.05, atol=0.05)
    assert block.mlp["gate_proj"].bias is None
    assert type(block.mlp["gate"]) is type(block.tied) is type(model["head"]) is nn.Linear
    block.attention(x, x, x)  # reads the weight of its output layer by itself
    assert swap(model) == []


def test_swap_where_and_skip() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})
    assert swap(model, where=r"layers\.1\..*gate_proj") == ["layers.1.mlp.gate_proj"]
    assert swap(model, where=r"bias$") == []
    assert swap(model, skip=lambda path: path == "up") == ["layers.0.mlp.gate", "layers.0.mlp.gate_proj", "layers.1.mlp.gate"]


def test_swap_on_meta_keeps_it_there() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"layers": nn.ModuleList([Block()])})
        swap(model)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model["layers"][0].up.absorb("weight", torch.randn(OUT, IN))
    assert model["layers"][0].up.weight.device.type == "cpu"
    assert model["layers"][0].up.bias.requires_grad  # as it was
