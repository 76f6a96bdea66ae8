"""Packing: against a packer in plain loops, written from the layout's text; exact bytes, every width, odd shapes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tightfit.formats.packing import BITS, chunks, pack, packed_bytes, unpack
from tightfit.terms.errors import TightfitError

COLUMNS = (1, 15, 16, 17, 64, 172, 384, 511, 512, 513, 768, 4096 + 16, 11008)


def random_codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(columns + bits))


def pack_row_plainly(codes: list[int], bits: int) -> bytes:
    """One row, code by code."""
    left, lanes = -(-len(codes) // 16), []
    while left >= 32:
        lanes.append(32)
        left -= 32
    for power in (16, 8, 4, 2, 1):
        if left >= power:
            lanes.append(power)
            left -= power
    packed, start = bytearray(), 0
    for count in lanes:
        words = [[0] * count for _ in range(bits)]
        for lane in range(count):
            for k in range(16):
                column = start + k * count + lane
                code = codes[column] if column < len(codes) else 0
                if bits == 3 and k == 15:
                    for j in range(3):
                        words[j][lane] |= ((code >> j) & 1) << 15
                else:
                    in_word = {2: 8, 3: 5, 4: 4, 8: 2}[bits]
                    words[k // in_word][lane] |= code << (bits * (k % in_word))
        for row in words:
            for word in row:
                packed += word.to_bytes(2, "little")
        start += 16 * count
    return bytes(packed)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bits", BITS)
def test_packs_like_plain_loops_and_back(columns: int, bits: int) -> None:
    codes = random_codes(3, columns, bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int8
    assert [row.numpy().tobytes() for row in packed] == [pack_row_plainly(row, bits) for row in codes.tolist()]
    assert packed.shape == (3, packed_bytes(columns, bits))
    found = unpack(packed, columns, bits)
    assert found.dtype == torch.uint8 and torch.equal(found, codes)


def test_takes_exactly_its_bits() -> None:
    assert [packed_bytes(4096, bits) for bits in BITS] == [1024, 1536, 2048, 4096]
    assert [packed_bytes(172, bits) for bits in BITS] == [44, 66, 88, 176]  # 11 lanes
    assert packed_bytes(1, 3) == 6


def test_chunks_are_the_binary_digits_of_the_lanes() -> None:
    assert chunks(172) == [(0, 8), (128, 2), (160, 1)]
    assert chunks(512 + 500) == [(0, 32), (512, 32)]
    assert chunks(1024 + 384) == [(0, 32), (512, 32), (1024, 16), (1280, 8)]
    assert chunks(1) == [(0, 1)] and chunks(0) == []
    for columns in range(1, 2000):
        ends = [start + 16 * lanes for start, lanes in chunks(columns)]
        assert [start for start, _ in chunks(columns)] == [0, *ends[:-1]] and 0 <= ends[-1] - columns < 16


def test_a_single_code_lies_where_the_text_says() -> None:
    codes = torch.zeros(1, 512, dtype=torch.uint8)
    codes[0, 7 * 32 + 5] = 0b101  # k = 7, lane 5: word 1, bits 6 to 8 of 3-bit codes
    codes[0, 15 * 32 + 9] = 0b110  # k = 15, lane 9: bit 15 of words 1 and 2
    words = pack(codes, 3).view(torch.int16)[0].view(3, 32)
    expected = torch.zeros(3, 32, dtype=torch.int16)
    expected[1, 5] = 0b101 << 6
    expected[1, 9] = expected[2, 9] = -(1 << 15)
    assert torch.equal(words, expected)


@pytest.mark.parametrize("bits", BITS)
def test_many_rows_go_slice_by_slice(bits: int) -> None:
    codes = random_codes(700, 4096 + 20, bits)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, 4096 + 20, bits), codes)
    assert torch.equal(packed[650:], pack(codes[650:], bits))
    assert torch.equal(unpack(packed[650:], 4096 + 20, bits), codes[650:])


def test_packed_rows_may_lie_at_an_odd_byte() -> None:
    codes = random_codes(5, 100, 3)
    packed = pack(codes, 3)
    shifted = torch.empty(packed.numel() + 1, dtype=torch.int8)[1:].view(packed.shape).copy_(packed)
    assert shifted.storage_offset() == 1
    assert torch.equal(unpack(shifted, 100, 3), codes)
    wider = torch.cat((packed, packed), dim=1)[:, : packed.shape[1]]
    assert not wider.is_contiguous() and torch.equal(unpack(wider, 100, 3), codes)


@pytest.mark.parametrize("bits", BITS)
def test_shapes_are_known_without_values(bits: int) -> None:
    codes = torch.empty(4, 100, dtype=torch.uint8, device="meta")
    assert unpack(pack(codes, bits), 100, bits).shape == (4, 100)
    with FakeTensorMode():
        packed = pack(torch.empty(4, 100, dtype=torch.uint8), bits)
        assert packed.shape == (4, packed_bytes(100, bits)) and unpack(packed, 100, bits).dtype == torch.uint8


def test_no_rows_pack_into_none() -> None:
    packed = pack(torch.empty(0, 64, dtype=torch.uint8), 4)
    assert packed.shape == (0, 32) and unpack(packed, 64, 4).shape == (0, 64)


@pytest.mark.parametrize("bits", [0, 1, 5, 16])
def test_other_widths_are_refused(bits: int) -> None:
    codes = torch.zeros(2, 16, dtype=torch.uint8)
    for call in (lambda: pack(codes, bits), lambda: unpack(codes.view(torch.int8), 16, bits), lambda: packed_bytes(16, bits)):
        with pytest.raises(TightfitError, match=f"codes of {bits} bits") as fault:
            call()
        assert fault.value.hint


def test_a_code_that_is_too_large_would_spoil_its_neighbours() -> None:
    with pytest.raises(AssertionError):
        pack(torch.tensor([[8]], dtype=torch.uint8), 3)
