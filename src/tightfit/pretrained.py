"""Pretrained: after `import tightfit`, transformers' own `from_pretrained` reads the folders that `tightfit quantize` wrote.

transformers keeps a list of loaders by name. Ours is entered when that list is imported, since `import tightfit` imports nothing heavy.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from tightfit.terms.quantizing import METHOD

_LIST = "transformers.quantizers.auto"


def enter() -> None:
    """Make transformers know tightfit's format: now if it keeps its list already, else as soon as it does."""
    if _LIST in sys.modules:
        _enter(sys.modules[_LIST])
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Finds one module as Python would, and has something done once it is there."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _LIST:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec and spec.loader:
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """The loader that it was given, and then `_enter`."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _enter(module)


def _enter(auto: Any) -> None:
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return

    @auto.register_quantization_config(METHOD)
    class TightfitConfig(QuantizationConfigMixin):
        """`quantization_config` of a folder that `tightfit quantize` wrote."""

        def __init__(self, **values: Any) -> None:
            from tightfit.formats.stored import StoredFormat  # here, since a model of another format needs none of it

            self.quant_method = METHOD
            self.stored = StoredFormat.read(values)

        def to_dict(self) -> dict[str, Any]:
            return self.stored.note()

        def to_diff_dict(self) -> dict[str, Any]:
            return self.stored.note()

    @auto.register_quantizer(METHOD)
    class TightfitQuantizer(HfQuantizer):
        """Puts empty layers of few bits into the model, which transformers then fills from the file."""

        requires_calibration = True  # weights come quantized, or not at all

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            self.quantization_config.stored.prepare(model)

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True
