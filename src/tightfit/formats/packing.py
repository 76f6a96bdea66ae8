"""Packing: codes of 2, 3, 4 or 8 bits in exactly so many bits, in the order in which a vector register takes them.

The layout of a row, all of it little endian:

- Columns are cut into *chunks* of 16·L columns with L *lanes*: 32, as long as so many are left; what remains is cut into the powers of
  two of its lanes' binary digits, the largest first (11 lanes = 8 + 2 + 1). Columns past the end are padding, code 0.
- Lane `l` of a chunk that begins at column `s` holds the 16 columns `s + k·L + l`, `k` = 0 … 15, in `bits` words of 16 bits. Word `j` of
  all lanes lies before word `j + 1` of any: the memory of a chunk is [word][lane].
- Where `bits` divides 16, code `k` is bits `bits·k % 16 …` of word `bits·k // 16`. With 3 bits, word `j` holds `k` = 5j … 5j+4 in its
  lowest 15 bits, and its bit 15 is bit `j` of `k` = 15.

So one load fills a 512-bit register with 32 words. Shifted right by a code's place, each word is at once an index for `vpermw`, which looks
at five bits only: into a table that is repeated up to 32 entries, without a mask. And the inputs that belong to a shift lie side by side.
"""

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from tightfit.formats.codec import row_slices
from tightfit.terms.errors import TightfitError
from tightfit.terms.units import MIB

BITS = (2, 3, 4, 8)
"""Widths of a code."""

LANES = 32
"""Words of 16 bits in a 512-bit register."""

DEPTH = 16
"""Codes of a lane: the least number that fills whole words at every width."""

_SLICE_CODES = MIB
"""Codes that are moved at a time: with their words they stay in the second-level cache."""


def chunks(columns: int) -> list[tuple[int, int]]:
    """The first column and the lanes of every chunk, in the order in which they lie."""
    lanes = -(-columns // DEPTH)
    sizes = [LANES] * (lanes // LANES) + [1 << digit for digit in reversed(range(LANES.bit_length() - 1)) if lanes >> digit & 1]
    return list(zip(accumulate((DEPTH * size for size in sizes), initial=0), sizes, strict=False))


def padded_columns(columns: int) -> int:
    """Columns with the padding: whole lanes."""
    return -(-columns // DEPTH) * DEPTH


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of a packed row: exactly `bits` a weight where 16 divides the columns. Raises `TightfitError` for other widths."""
    check_bits(bits)
    return padded_columns(columns) * bits // 8


def check_bits(bits: int) -> None:
    """Raise `TightfitError` for a width that is not packed."""
    if bits not in BITS:
        raise TightfitError(f"codes of {bits} bits cannot be packed", hint="`bits` is 2, 3, 4 or 8")


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, each below 2^bits, in the layout above.  # (rows, columns) uint8 → (rows, packed_bytes) int8

    Raises `TightfitError` for other widths than `BITS`. Beside the result, a few MiB.
    """
    rows, columns = codes.shape
    row_bytes = packed_bytes(columns, bits)
    packed = torch.empty(rows, row_bytes, dtype=torch.int8, device=codes.device)
    for start, stop in row_slices(rows, max(columns, 1), 1, _SLICE_CODES):
        part = torch.nn.functional.pad(codes[start:stop], (0, padded_columns(columns) - columns))
        assert codes.is_meta or isinstance(codes, FakeTensor) or bits == 8 or not (part >> bits).any(), "a code needs more bits"
        words = torch.zeros(stop - start, row_bytes // 2, dtype=torch.int16, device=codes.device)
        for inside, those in _blocks(part, words, columns, bits):
            for k, word, shift, mask, place in _pieces(bits):
                those[:, :, word] |= ((inside[:, :, k].to(torch.int16) >> place) & mask) << shift
        packed[start:stop] = words.view(torch.int8)
    return packed


def unpack(packed: Tensor, columns: int, bits: int) -> Tensor:
    """The inverse of `pack`.  # (rows, packed_bytes) int8 → (rows, columns) uint8

    Raises `TightfitError` for other widths than `BITS`. Beside the result it holds at most as much again, and of many rows less.
    """
    check_bits(bits)
    rows = packed.shape[0]
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=packed.device)
    whole = columns == padded_columns(columns)
    for start, stop in row_slices(rows, max(columns, 1), 1, _SLICE_CODES):
        part = codes[start:stop] if whole else codes.new_empty(stop - start, padded_columns(columns))
        for inside, those in _blocks(part, _words(packed[start:stop]), columns, bits):
            for k, word, shift, mask, place in _pieces(bits):
                piece = ((those[:, :, word] >> shift) & mask) << place
                if place:
                    inside[:, :, k] |= piece
                else:
                    inside[:, :, k] = piece
        if not whole:
            codes[start:stop] = part[:, :columns]
    return codes


def _words(packed: Tensor) -> Tensor:
    """The 16-bit words of some rows, copied where they do not begin at an even byte of their storage, as mapped files may have it."""
    even = packed if packed.storage_offset() % 2 == 0 and packed.is_contiguous() else packed.clone(memory_format=torch.contiguous_format)
    return even.view(torch.int16)


def _blocks(codes: Tensor, words: Tensor, columns: int, bits: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of chunks with equally many lanes: codes (rows, chunks, 16, lanes) and words (rows, chunks, bits, lanes)."""
    layout = chunks(columns)
    whole = sum(lanes == LANES for _, lanes in layout)
    runs = [(0, whole, LANES)] if whole else []
    runs += [(start, 1, lanes) for start, lanes in layout[whole:]]
    for start, count, lanes in runs:
        width = count * lanes
        inside = codes[:, start : start + DEPTH * width].unflatten(1, (count, DEPTH, lanes))
        first = start // DEPTH * bits
        yield inside, words[:, first : first + bits * width].unflatten(1, (count, bits, lanes))


def _pieces(bits: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Where each code of a lane lies: code, word, bit of the word, mask, bit of the code."""
    fitting = 16 // bits  # codes that a word holds whole
    for k in range(min(DEPTH, fitting * bits)):
        yield k, k // fitting, k % fitting * bits, (1 << bits) - 1, 0
    for bit in range(bits if bits == 3 else 0):
        yield DEPTH - 1, bit, 15, 1, bit
