"""Stored: a model whose weights lie in few bits in its files: what `config.json` says of them, and the layers that take them so."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from tightfit.formats.affine import AffineCodec
from tightfit.formats.codec import Codec
from tightfit.formats.experts import QuantizedExperts
from tightfit.formats.linear import LINEARS, QuantizedLinear, replace
from tightfit.formats.packing import BITS
from tightfit.formats.table import TableCodec
from tightfit.terms.errors import TightfitError
from tightfit.terms.quantizing import METHOD
from tightfit.terms.restore import restore


@dataclass(frozen=True)
class StoredFormat:
    """How the weights of `layers` (paths of modules) are stored; all else is dense."""

    format: Literal["table", "affine"]
    bits: int
    layers: tuple[str, ...]
    group: int = 0

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "StoredFormat":
        """From `quantization_config`. Raises `TightfitError` for what this version does not know."""
        try:
            known = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
            found = restore(cls, known)
        except TypeError as error:
            raise TightfitError(f"the `quantization_config` is damaged: {error}", hint="quantize the model again") from error
        if found.bits not in BITS:
            raise TightfitError(f"the weights are stored in {found.bits} bits, which nothing here reads", hint="a newer tightfit wrote it")
        return found

    @classmethod
    def of(cls, model: nn.Module) -> "StoredFormat":
        """What the quantized layers of `model` are stored in; all of them alike."""
        layers = {path: module.codec for path, module in model.named_modules() if isinstance(module, QuantizedLinear | QuantizedExperts)}
        codecs = set(layers.values())
        assert len(codecs) == 1, "one technique quantizes all layers alike"
        codec = codecs.pop()
        if isinstance(codec, AffineCodec):
            return cls("affine", codec.bits, tuple(layers), codec.group)
        assert isinstance(codec, TableCodec)
        return cls("table", codec.bits, tuple(layers))

    @property
    def codec(self) -> Codec:
        """The codec of every layer."""
        return TableCodec(self.bits) if self.format == "table" else AffineCodec(self.bits, self.group)

    def note(self) -> dict[str, Any]:
        """For `quantization_config`."""
        return {"quant_method": METHOD, **asdict(self), "layers": list(self.layers)}

    def prepare(self, model: nn.Module) -> None:
        """Put empty quantized layers, on `meta`, in the place of `layers`. Raises `TightfitError` where the model has no such layer."""
        for path in self.layers:
            try:
                dense = model.get_submodule(path)
            except AttributeError as error:
                raise TightfitError(
                    f"the config stores `{path}` in few bits, and the model has no such layer", hint="is `config.json` of this model?"
                ) from error
            replace(model, path, self._quantized(path, dense))

    def _quantized(self, path: str, dense: nn.Module) -> nn.Module:
        kind = (type(dense).__module__, type(dense).__name__)
        if kind not in LINEARS:
            return QuantizedExperts(dense, self.codec)
        transposed = LINEARS[kind]
        columns, rows = dense.weight.shape if transposed else dense.weight.shape[::-1]
        bias, dtype = dense.bias is not None, dense.weight.dtype
        return QuantizedLinear(columns, rows, self.codec, bias=bias, transposed=transposed, dtype=dtype).train(dense.training)
