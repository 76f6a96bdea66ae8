"""Kernels: products with weights in few bits, and their decoding. C on a CPU, Triton on a GPU, and plain torch everywhere else."""

from tightfit.formats.kernels.cpu import (
    affine_decode,
    affine_decode_bytes,
    affine_product,
    has_product,
    padded_bytes,
    table_decode,
    table_decode_bytes,
    table_product,
)

__all__ = [
    "affine_decode",
    "affine_decode_bytes",
    "affine_product",
    "has_product",
    "padded_bytes",
    "table_decode",
    "table_decode_bytes",
    "table_product",
]
