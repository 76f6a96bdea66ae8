"""Codec: slices of rows, products slice by slice against one product, and the bytes that they say they need."""

import pytest
import torch

from tightfit.formats import codec as codecs
from tightfit.formats.codec import SLICED, as_if_on, check_finite, device_of, row_slices
from tightfit.formats.int8 import Int8Codec
from tightfit.formats.nf4 import NF4Codec
from tightfit.rehearse.meter import Meter
from tightfit.terms.errors import TightfitError

CODECS = [Int8Codec(), NF4Codec(), NF4Codec("standard", False), NF4Codec("packed")]
SHAPE = (192, 128)


@pytest.mark.parametrize(
    ("rows", "row_bytes", "step", "limit", "expected"),
    [
        (10, 1, 1, 4, [(0, 4), (4, 8), (8, 10)]),
        (10, 1, 4, 6, [(0, 4), (4, 8), (8, 10)]),
        (10, 100, 3, 1, [(0, 3), (3, 6), (6, 9), (9, 10)]),
        (2, 1, 1, 1000, [(0, 2)]),
    ],
)
def test_row_slices(rows: int, row_bytes: int, step: int, limit: int, expected: list[tuple[int, int]]) -> None:
    assert row_slices(rows, row_bytes, step, limit) == expected


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sliced_product_is_the_product_of_the_decoded_matrix(codec, dtype, monkeypatch) -> None:
    torch.manual_seed(0)
    stored = codec.encode(torch.randn(SHAPE))
    whole = codec.decode(stored, SHAPE, 0, SHAPE[0], dtype)
    x, gradient = torch.randn(600, SHAPE[1], dtype=dtype), torch.randn(600, SHAPE[0], dtype=dtype)
    monkeypatch.setitem(codecs.SLICE_BYTES, "cpu", 64 * SHAPE[1] * dtype.itemsize)
    assert codec.kernel("cpu", dtype, 600, SHAPE) == SLICED
    assert len(codec.slices(SHAPE, dtype, "cpu")) >= (2 if codec == NF4Codec() else 3)
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(codec.product(x, stored, SHAPE), x @ whole.t(), rtol=bound, atol=bound)
    torch.testing.assert_close(codec.product_transposed(gradient, stored, SHAPE), gradient @ whole, rtol=2 * bound, atol=16 * bound)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_slices_decode_to_the_same_rows(codec, monkeypatch) -> None:
    torch.manual_seed(0)
    stored = codec.encode(torch.randn(SHAPE))
    monkeypatch.setitem(codecs.SLICE_BYTES, "cpu", 32 * SHAPE[1] * 4)
    parts = [codec.decode(stored, SHAPE, start, stop, torch.float32) for start, stop in codec.slices(SHAPE, torch.float32, "cpu")]
    assert len(parts) > 1
    assert torch.equal(torch.cat(parts), codec.decode(stored, SHAPE, 0, SHAPE[0], torch.float32))


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 300])
def test_a_product_needs_the_bytes_that_it_says(codec, dtype, tokens, monkeypatch) -> None:
    shape = (512, 512)
    stored = codec.encode(torch.randn(shape))
    x, gradient = torch.randn(tokens, shape[1], dtype=dtype), torch.randn(tokens, shape[0], dtype=dtype)
    monkeypatch.setitem(codecs.SLICE_BYTES, "cpu", 128 * shape[1] * dtype.itemsize)
    forward = _peak_bytes(lambda: codec.product(x, stored, shape), x, *stored) - tokens * shape[0] * dtype.itemsize
    assert forward == pytest.approx(codec.product_bytes("cpu", dtype, tokens, shape), rel=0.01, abs=16)
    backward = (
        _peak_bytes(lambda: codec.product_transposed(gradient, stored, shape), gradient, *stored) - tokens * shape[1] * dtype.itemsize
    )
    assert backward == pytest.approx(codec.transposed_bytes("cpu", dtype, shape), rel=0.01, abs=16)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_parts_are_what_encode_returns(codec) -> None:
    stored = codec.encode(torch.randn(SHAPE))
    assert [(part.shape, part.dtype) for part in codec.parts(SHAPE)] == [(tuple(tensor.shape), tensor.dtype) for tensor in stored]
    assert codec.parts(SHAPE)[0].dtype == torch.int8


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize(("bad", "message"), [(float("nan"), "weight holds NaN"), (float("-inf"), "weight holds infinite values")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bad_numbers_are_refused(codec, bad, message, dtype) -> None:
    dense = torch.randn(64, 64).to(dtype)
    check_finite(dense)
    dense[5, 7] = bad
    with pytest.raises(TightfitError, match=f"^{message}$"):
        codec.encode(dense)


def test_the_device_to_rehearse_can_be_named() -> None:
    x = torch.zeros(1)
    with as_if_on("cuda"):
        assert device_of(x) == "cuda"
        with as_if_on("cpu"):
            assert device_of(x) == "cpu"
        assert device_of(x) == "cuda"
    assert device_of(x) == "cpu"


def _peak_bytes(run, *known) -> int:
    """Most bytes that `run` held in new storages at one time, its result included; those of `known` were there before."""
    meter = Meter()
    meter.adopt(known, "weights")
    with meter:
        run()
    return max(kinds.get("activations", 0) for kinds in meter.phases.values())
