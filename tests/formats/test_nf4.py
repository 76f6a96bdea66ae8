"""NF4: codes and scales against bitsandbytes' own and against a plain table, both layouts, odd shapes, bits per weight."""

import copy

import bitsandbytes.functional as bitsandbytes
import pytest
import torch

from tightfit.formats import nf4
from tightfit.formats.codec import SLICED
from tightfit.formats.linear import QuantizedLinear
from tightfit.formats.nf4 import NF4Codec

QUANTILES = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""QLoRA, appendix E."""

WIDEST_GAP = 1 - 0.6961928009986877
SHAPES = [(64, 128), (5, 96), (6, 130), (7, 33), (3, 1), (8, 100)]


def encode_plainly(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest quantile of every weight over the absmax of its block of 64, blocks running across rows.  → codes, decoded"""
    flat = torch.nn.functional.pad(dense.flatten(), (0, -dense.numel() % 64)).view(-1, 64)
    absmax = flat.abs().amax(dim=1, keepdim=True)
    table = torch.tensor(QUANTILES)
    codes = (flat / absmax.clamp(min=1e-30)).unsqueeze(-1).sub(table).abs().argmin(dim=-1)
    return codes.flatten()[: dense.numel()], (table[codes] * absmax).flatten()[: dense.numel()].view(dense.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_equals_the_nearest_quantiles(shape) -> None:
    torch.manual_seed(0)
    dense, codec = torch.randn(shape), NF4Codec("standard", double_quantization=False)
    decoded = codec.decode(codec.encode(dense), shape, 0, shape[0], torch.float32)
    torch.testing.assert_close(decoded, encode_plainly(dense)[1], rtol=1e-6, atol=1e-7)
    assert (decoded - dense).abs().max() <= WIDEST_GAP / 2 * dense.abs().max() * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_standard_is_what_bitsandbytes_stores(dtype) -> None:
    torch.manual_seed(0)
    dense, codec = (torch.randn(128, 320) * 0.02).to(dtype), NF4Codec()
    packed, state = bitsandbytes.quantize_4bit(dense, blocksize=64, quant_type="nf4", compress_statistics=True)
    codes, absmax, nested_absmax, nested_code, offset = codec.encode(dense)
    assert torch.equal(codes.view(torch.uint8).flatten(), packed.flatten())
    assert torch.equal(absmax, state.absmax)
    assert torch.equal(nested_absmax, state.state2.absmax)
    assert torch.equal(nested_code, state.state2.code)
    assert torch.equal(offset, state.offset.view(1))
    decoded = codec.decode((codes, absmax, nested_absmax, nested_code, offset), (128, 320), 0, 128, dtype)
    assert torch.equal(decoded, bitsandbytes.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quantization", [True, False])
def test_slices_of_odd_shapes(shape, double_quantization) -> None:
    torch.manual_seed(0)
    dense, codec = torch.randn(shape), NF4Codec("standard", double_quantization)
    stored = codec.encode(dense)
    whole = codec.decode(stored, shape, 0, shape[0], torch.float32)
    step = codec.row_step(shape)
    parts = [codec.decode(stored, shape, start, min(start + step, shape[0]), torch.float32) for start in range(0, shape[0], step)]
    assert torch.equal(torch.cat(parts), whole)
    assert (whole - dense).abs().max() <= (WIDEST_GAP / 2 + 0.05) * dense.abs().max()


def test_packed_is_the_order_of_the_fused_kernel() -> None:
    torch.manual_seed(0)
    dense, codec = torch.randn(96, 192), NF4Codec("packed")
    codes, state = bitsandbytes.quantize_4bit(dense, blocksize=64, quant_type="nf4")
    expected, packed_state = bitsandbytes._convert_weight_packed_for_cpu(codes.clone(), copy.deepcopy(state))
    stored = codec.encode(dense)
    assert torch.equal(stored[0].view(torch.uint8), expected)
    assert torch.equal(stored[1], packed_state.absmax)
    assert torch.equal(nf4._unpack(stored[0], 192), codes.flatten())
    decoded = codec.decode(stored, (96, 192), 0, 96, torch.float32)
    plain = encode_plainly(dense)[1]
    torch.testing.assert_close(decoded, plain, rtol=2**-8, atol=0)  # scales are in bfloat16
    assert torch.equal(codec.decode(stored, (96, 192), 32, 64, torch.float32), decoded[32:64])


@pytest.mark.skipif(not nf4.has_packed_kernel(), reason="needs a CPU with AVX512-BF16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5, nf4.PACKED_TOKENS])
def test_the_fused_kernel_multiplies_with_the_decoded_weight(dtype, tokens) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear(256, 96, NF4Codec("packed"), bias=False, dtype=dtype)
    layer.absorb("weight", torch.randn(96, 256))
    x = torch.randn(tokens, 256).to(dtype)
    assert layer.codec.kernel("cpu", dtype, tokens, layer.shape) == "gemv_4bit"
    expected = x.double() @ layer.dequantize(torch.float32).double().t()
    assert (layer(x).double() - expected).abs().max() < 2**-7 * expected.abs().max() + 0.05
    assert layer(x).dtype == dtype


def test_bits_per_weight() -> None:
    def bits(**settings) -> float:
        return sum(tensor.nbytes for tensor in QuantizedLinear(4096, 4096, NF4Codec(**settings), bias=False).stored) * 8 / 4096**2

    assert bits() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)
    assert bits(double_quantization=False) == 4.5
    assert bits(layout="packed") == 4.25


@pytest.mark.parametrize(("shape", "packed"), [((64, 128), True), ((33, 128), False), ((64, 100), False)])
def test_shapes_that_the_fused_kernel_cannot_take_are_kept_standard(shape, packed) -> None:
    codec = NF4Codec("packed")
    assert codec.is_packed(shape) == packed
    assert len(codec.parts(shape)) == (2 if packed else 5)
    assert (codec.kernel("cpu", torch.bfloat16, 1, shape) == "gemv_4bit") == (packed and nf4.has_packed_kernel())


def test_kernels_are_named() -> None:
    packed, standard, shape = NF4Codec("packed"), NF4Codec(), (64, 128)
    assert packed.kernel("cpu", torch.bfloat16, nf4.PACKED_TOKENS + 1, shape) == SLICED
    assert packed.kernel("cuda", torch.bfloat16, 1, shape) == SLICED
    assert standard.kernel("cpu", torch.bfloat16, 1, shape) == SLICED
    fused = SLICED if torch.version.hip else "gemm_4bit"
    assert standard.kernel("cuda", torch.bfloat16, nf4.FUSED_TOKENS, shape) == fused
    assert standard.kernel("cuda", torch.bfloat16, nf4.FUSED_TOKENS + 1, shape) == SLICED
    assert standard.kernel("cuda", torch.bfloat16, 1, (64, 100)) == SLICED


def test_the_arguments_of_the_cuda_kernel() -> None:
    """On a CPU `gemm_4bit` decodes and multiplies, so what it is handed can be checked without a GPU."""
    for double_quantization in (True, False):
        layer = QuantizedLinear(128, 64, NF4Codec("standard", double_quantization), bias=False)
        layer.absorb("weight", torch.randn(64, 128))
        x = torch.randn(3, 128)
        torch.testing.assert_close(layer.codec.kernel_product(x, layer.stored, layer.shape), x @ layer.dequantize().t())


@pytest.mark.parametrize("layout", ["standard", "packed"])
def test_blocks_of_zeros_stay_zero(layout) -> None:
    layer = QuantizedLinear(128, 32, NF4Codec(layout), bias=False)
    layer.absorb("weight", torch.zeros(32, 128))
    assert torch.equal(layer.dequantize(), torch.zeros(32, 128))
    assert torch.equal(layer(torch.ones(1, 128)), torch.zeros(1, 32))


def test_float64_is_decoded_too() -> None:
    layer = QuantizedLinear(64, 32, NF4Codec(), bias=False, dtype=torch.float64)
    layer.absorb("weight", torch.randn(32, 64, dtype=torch.float64))
    assert torch.equal(layer.dequantize(torch.float64), layer.dequantize(torch.float32).double())
    assert layer(torch.randn(2, 64, dtype=torch.float64)).dtype == torch.float64
