"""Int8: the grid against plain arithmetic in float64, its bounds and its edges, and the kernel that takes few tokens."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tightfit.formats import codec as codecs
from tightfit.formats.codec import SLICED, as_if_on
from tightfit.formats.int8 import KERNEL_TOKENS, Int8Codec, bfloat16_above, int8pack_bytes
from tightfit.formats.linear import QuantizedLinear
from tightfit.rehearse.meter import Meter

CODEC = Int8Codec()


def encode_plainly(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same grid in float64, with the scale rounded up by looking at the next bfloat16."""
    exact = dense.double().abs().amax(dim=1) / 127
    exact[exact == 0] = 1
    down = exact.to(torch.bfloat16)
    up = torch.nextafter(down, torch.full_like(down, float("inf")))
    scale = torch.where(down.double() < exact * (1 - 1e-7), up, down)
    return torch.round(dense.double() / scale.double()[:, None]).to(torch.int8), scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_encode_equals_plain_arithmetic(dtype) -> None:
    torch.manual_seed(0)
    dense = (torch.randn(50, 37) * torch.logspace(-4, 2, 50)[:, None]).to(dtype)
    codes, scale = CODEC.encode(dense)
    expected_codes, expected_scale = encode_plainly(dense)
    assert torch.equal(scale, expected_scale)
    assert (codes.int() - expected_codes.int()).abs().max() <= 1  # float32 and float64 may disagree at an exact half
    assert (codes != expected_codes).float().mean() < 1e-3


def test_every_weight_is_within_half_a_step() -> None:
    torch.manual_seed(0)
    dense = torch.randn(64, 300)
    codes, scale = CODEC.encode(dense)
    decoded = CODEC.decode((codes, scale), (64, 300), 0, 64, torch.float32)
    assert torch.equal(decoded, codes.float() * scale.float()[:, None])
    error = (decoded - dense).abs() / scale.float()[:, None]
    assert error.max() <= 0.5 + 1e-5
    assert error.max() > 0.45  # else the bound says nothing
    assert codes.abs().max() <= 127
    assert (scale.float() < dense.abs().amax(dim=1) / 127 * (1 + 2**-7)).all()


def test_halves_round_to_even() -> None:
    dense = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    codes, scale = CODEC.encode(dense)
    assert scale.item() == 1
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_a_row_of_zeros_stays_zero() -> None:
    codes, scale = CODEC.encode(torch.tensor([[0.0, 0.0], [0.0, 254.0]]))
    assert scale[0] == 1 and codes[0].tolist() == [0, 0]
    assert codes[1].tolist() == [0, 127]


@pytest.mark.parametrize("value", [1e-40, 1e-30, 3e38])
def test_extreme_rows_stay_finite(value) -> None:
    dense = torch.tensor([[value, -value]])
    decoded = CODEC.decode(CODEC.encode(dense), (1, 2), 0, 1, torch.float32)
    torch.testing.assert_close(decoded, dense, rtol=0.02, atol=1e-40)  # half of the least bfloat16


def test_rounding_up_to_bfloat16() -> None:
    assert bfloat16_above(torch.tensor([1.0, 1.0 + 2**-20, 1.0 + 2**-7, 3.0e-5])).tolist() == [
        1.0,
        1.0 + 2**-7,
        1.0 + 2**-7,
        3.0040740966796875e-05,
    ]


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
def test_the_weights_are_the_same_in_every_dtype_of_the_input(size) -> None:
    """Rounded once. Scales below 6e-5 have fewer digits in float16, and none below 3e-8: rows of small weights would vanish."""
    stored = CODEC.encode(size * torch.randn(8, 64))
    wide = CODEC.decode(stored, (8, 64), 0, 8, torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(CODEC.decode(stored, (8, 64), 0, 8, dtype), wide.to(dtype))
    assert wide.to(torch.float16).abs().amax(dim=1).gt(0).all()


@pytest.mark.parametrize("tokens", [1, 40])
def test_products_in_float16_do_not_lose_tiny_rows(tokens) -> None:
    """Weights near 1e-6, and an input large enough that the result is a common number."""
    dense, x = 1e-6 * torch.randn(32, 64), (1e4 * torch.randn(tokens, 64)).half()
    stored = CODEC.encode(dense.half())
    expected = x.double() @ dense.half().double().t()
    error = CODEC.product(x, stored, (32, 64)).double() - expected
    assert error.norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("columns", [64, 1])
def test_slices_in_float16_need_the_bytes_that_they_say(columns, monkeypatch) -> None:
    """The float32 rows, then those beside the float16 ones."""
    monkeypatch.setitem(codecs.SLICE_BYTES, "cpu", 32 * columns * 2)
    stored, x, meter = CODEC.encode(torch.randn(96, columns)), torch.randn(20, columns).half(), Meter()
    meter.adopt([*stored, x], "weights")
    with meter:
        y = CODEC.product(x, stored, (96, columns))
    held = max(kinds.get("activations", 0) for kinds in meter.phases.values())
    assert held - y.nbytes == CODEC.product_bytes("cpu", torch.float16, 20, (96, columns)) == 32 * max(6 * columns, 4 * (columns + 1))


def test_the_cuda_kernel_in_float16_needs_the_bytes_that_it_says() -> None:
    shape, meter = (64, 128), Meter()
    with FakeTensorMode(), as_if_on("cuda"):
        stored = torch.empty(shape, dtype=torch.int8), torch.empty(64, dtype=torch.bfloat16)
        x = torch.empty(2, 128, dtype=torch.float16)
        meter.adopt([*stored, x], "weights")
        with meter:
            y = CODEC.product(x, stored, shape)
    held = max(kinds.get("activations", 0) + kinds["workspace"] for kinds in meter.phases.values())
    assert y.dtype == torch.float16
    assert held - y.nbytes <= CODEC.product_bytes("cuda", torch.float16, 2, shape) <= held


def test_bytes_on_meta_are_eight_bits_a_weight_and_two_bytes_a_row() -> None:
    layer = QuantizedLinear(4096, 1024, CODEC, bias=False)
    assert all(tensor.is_meta for tensor in layer.stored)
    assert sum(tensor.nbytes for tensor in layer.stored) == 4096 * 1024 + 2 * 1024


@pytest.mark.parametrize("tokens", [1, KERNEL_TOKENS["cpu"], KERNEL_TOKENS["cpu"] + 1])
@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (33, 80), (33, 70), (1, 3)])
def test_kernel_and_slices_agree(tokens, rows, columns) -> None:
    torch.manual_seed(0)
    layer = QuantizedLinear(columns, rows, CODEC, bias=False, dtype=torch.bfloat16)
    layer.absorb("weight", torch.randn(rows, columns, dtype=torch.bfloat16))
    x = torch.randn(tokens, columns, dtype=torch.bfloat16)
    expected = x.double() @ layer.dequantize(torch.float64).t()
    torch.testing.assert_close(layer(x).double(), expected, rtol=2**-7, atol=0.01 * columns**0.5)


@pytest.mark.parametrize("moved", ["codes", "x"])
def test_unaligned_tensors_are_multiplied_too(moved) -> None:
    """The kernel loads whole vectors and crashes at other addresses; weights that lie in a file may have any."""
    torch.manual_seed(0)
    dense, x = torch.randn(32, 64), torch.randn(1, 64, dtype=torch.bfloat16)
    codes, scale = CODEC.encode(dense)
    expected = CODEC.product(x, (codes, scale), (32, 64))
    if moved == "codes":
        codes = torch.cat((torch.zeros(1, dtype=torch.int8), codes.flatten()))[1:].view(32, 64)
    else:
        x = torch.cat((torch.zeros(1, dtype=torch.bfloat16), x.flatten()))[1:].view(1, 64)
    torch.testing.assert_close(CODEC.product(x, (codes, scale), (32, 64)), expected, rtol=2**-7, atol=0.02)


def test_kernels_are_named_by_device_dtype_and_tokens() -> None:
    few, shape = KERNEL_TOKENS["cpu"], (64, 64)
    assert CODEC.kernel("cpu", torch.bfloat16, few, shape) == "_weight_int8pack_mm"
    assert CODEC.kernel("cpu", torch.bfloat16, few + 1, shape) == SLICED
    assert CODEC.kernel("cpu", torch.float32, 1, shape) == CODEC.kernel("cpu", torch.float16, 1, shape) == SLICED
    assert CODEC.kernel("cpu", torch.bfloat16, 1, (64, 80)) != SLICED
    assert CODEC.kernel("cpu", torch.bfloat16, 1, (64, 72)) == SLICED  # the kernel would read past the rows
    assert CODEC.kernel("cuda", torch.float16, 1, shape) == "_weight_int8pack_mm"
    assert CODEC.kernel("cpu", torch.bfloat16, 0, shape) == CODEC.kernel("meta", torch.bfloat16, 1, shape) == SLICED


def test_no_tokens_give_no_rows() -> None:
    layer = QuantizedLinear(8, 4, CODEC, dtype=torch.bfloat16)
    layer.absorb("weight", torch.randn(4, 8))
    assert layer(torch.empty(2, 0, 8, dtype=torch.bfloat16)).shape == (2, 0, 4)


def test_float32_copies_of_the_cuda_kernel_are_counted() -> None:
    assert int8pack_bytes(3, (5, 7), torch.bfloat16) == 4 * (3 * 7 + 3 * 5 + 5)
    assert CODEC.product_bytes("cuda", torch.bfloat16, 3, (5, 7)) == int8pack_bytes(3, (5, 7), torch.bfloat16)
    with as_if_on("cuda"):
        assert CODEC.slices((4096, 4096), torch.bfloat16, "cuda") == [(0, 2048), (2048, 4096)]
