"""Notes: which kernels the encoded layers of a model multiply with, so that a slow path is never a silent one."""

from collections import Counter

from torch import nn

from tightfit.formats.experts import QuantizedExperts
from tightfit.formats.linear import QuantizedLinear


def kernel_notes(model: nn.Module) -> list[str]:
    """One line for each kind of encoded layer and each place where it lies, with its kernels for one token and for very many."""
    layers = [module for module in model.modules() if isinstance(module, (QuantizedLinear, QuantizedExperts))]
    counts = Counter(
        (type(layer).__name__, str(layer.codec), layer.stored[0].device.type, str(layer.dtype), layer.path) for layer in layers
    )
    return [
        f"{count} {name} in {codec} on {device}, {dtype.removeprefix('torch.')}: `{small}` at one token, `{large}` at many"
        for (name, codec, device, dtype, (small, large)), count in sorted(counts.items())
    ]
