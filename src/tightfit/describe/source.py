"""Source: what people name a model by (hub id, folder, preset, live module) becomes a Skeleton."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from tightfit.describe.checkpoint import read_checkpoint
from tightfit.describe.hub import hub_folder, read_hub
from tightfit.describe.skeleton import Skeleton, match_origins, refuse_faults
from tightfit.describe.ties import stored_apart, tied_heads, untie
from tightfit.formats.stored import StoredFormat
from tightfit.presets import presets
from tightfit.terms.errors import TightfitError, near
from tightfit.terms.quantizing import METHOD
from tightfit.terms.workload import Task


def describe(source: str | nn.Module, task: Task = "generate", random_weights: bool = False, fetch: bool = True) -> Skeleton:
    """Put a model on paper; reads configs and headers, never a weight (but two that the config ties, to see whether they are one).

    `source` is a folder, the name of a preset, a Hugging Face id (from the cache, or fetched unless `HF_HUB_OFFLINE` is set),
    or a live module. With `random_weights` a missing checkpoint is no fault. Without `fetch` a hub's weights stay there: their headers
    are enough for a plan. Raises `TightfitError`.
    """
    if isinstance(source, nn.Module):
        return _live(source)
    folder, file, on_hub = _find(source, fetch and not random_weights)
    config, unties, stored = _load_config(file)
    model_class = _model_class(config, task)
    records = {}
    if folder is not None and not random_weights:
        records = read_hub(source, folder) if on_hub else read_checkpoint(folder)
    dtype = config.dtype if stored and isinstance(config.dtype, torch.dtype) else _stored_dtype(config, records)
    skeleton = Skeleton(source, config, model_class, dtype, folder=str(folder or ""), stored=stored)
    if folder is None and not unties:
        return skeleton
    model = _buildable(skeleton)
    if not records:
        return replace(skeleton, untied=tied_heads(model)) if unties else skeleton
    origins = match_origins(model, records)
    untied = stored_apart(model, {name: origin.records[0] for name, origin in origins.items() if origin.conversion is None})
    untie(model, untied)
    refuse_faults(model, origins)
    return replace(skeleton, origins=origins, untied=untied)


def _live(module: nn.Module) -> Skeleton:
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        raise TightfitError(
            f"a `{type(module).__name__}` is not a model of transformers, whose config tells what goes in",
            hint="give such a model, a folder, a preset or a hub id",
        )
    dtype = next((parameter.dtype for parameter in module.parameters() if parameter.dtype.is_floating_point), torch.float32)
    return Skeleton(type(module).__name__, module.config, type(module), dtype, live=module)


def _find(source: str, weights: bool) -> tuple[Path | None, Path, bool]:
    """The folder of the model (none for a bare preset), the file of its config, and whether it comes from the hub, with its `weights`."""
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:
        raise TightfitError(f"no model is called `{source}`: there is no such user", hint="write the folder out") from error
    if path.is_dir():
        return path, path / "config.json", False
    known = presets()
    if source.lower() in known:
        found = known[source.lower()]
        return (found, found / "config.json", False) if found.is_dir() else (None, found, False)
    if path.exists():
        raise TightfitError(f"`{source}` is a file", hint="name the folder that holds `config.json` and the weights")
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        folder = hub_folder(source, weights)
        return folder, folder / "config.json", True
    raise TightfitError(f"no model is called `{source}`: not a folder, a preset or a hub id", hint=near(source, known))


def _buildable(skeleton: Skeleton) -> nn.Module:
    """The meta model, or a clear word on the config from which none can be made."""
    try:
        return skeleton.meta_model()
    except Exception as error:  # each model class fails in its own way
        raise TightfitError(
            f"no model can be made from `{skeleton.folder}/config.json`: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            hint="compare its sizes and names with those of the original model",
        ) from error


def _load_config(file: Path) -> tuple[Any, bool, StoredFormat | None]:
    """The config, whether the file unties the head although its class ties it (T5's does, whatever it is told), and the quantization."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        values = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise TightfitError(f"`{file.parent}` has no `config.json`", hint="name a folder as `save_pretrained` writes it") from error
    except OSError as error:
        raise TightfitError(f"cannot read `{file}`: {error.strerror}") from error
    except ValueError as error:
        raise TightfitError(f"`{file}` is not JSON: {error}", hint="fetch it again from where the weights come") from error
    model_type = values.pop("model_type", None) if isinstance(values, dict) else None
    if not isinstance(model_type, str):
        raise TightfitError(
            f"`{file}` names no architecture", hint='it should say one under `"model_type"`, as `save_pretrained` writes it'
        )
    if model_type not in CONFIG_MAPPING:
        raise TightfitError(
            f"the architecture `{model_type}` is unknown to the installed transformers", hint=near(model_type, CONFIG_MAPPING.keys())
        )
    stored = _stored_format(values.pop("quantization_config", None))
    try:
        config = AutoConfig.for_model(model_type, **values)
    except Exception as error:  # transformers validates with its own many error classes
        raise TightfitError(f"`{file}` is not a valid `{model_type}` config: {' '.join(str(error).split())[:200]}") from error
    return config, values.get("tie_word_embeddings") is False and vars(config).get("tie_word_embeddings") is True, stored


def _stored_format(quantization: Any) -> StoredFormat | None:
    """What `tightfit quantize` wrote; None for a dense model. Raises for the formats of others."""
    method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
    if not quantization:
        return None
    if method == METHOD:
        return StoredFormat.read(quantization)
    raise TightfitError(
        f"the weights are already quantized (`{method}`)", hint="name the original model; tightfit quantizes while it loads"
    )


def _model_class(config: Any, task: Task) -> type[nn.Module]:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    named = [name for name in config.architectures or () if _is_offered(transformers, name)]
    generates = {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()}
    if task == "generate" and (not named or named[0] not in generates):
        names = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        if named or config.model_type not in names:
            raise TightfitError(
                f"`{(named or [config.model_type])[0]}` does not write text", hint="plan it with `--task embed` or `--task tune`"
            )
        named = [names[config.model_type]]
    if not named:
        named = [auto.MODEL_MAPPING_NAMES[config.model_type]]
    return getattr(transformers, named[0])


def _is_offered(package: ModuleType, name: str) -> bool:
    """Whether the lazy `package` has `name`; asking it for all its names takes a quarter of a second."""
    try:
        getattr(package, name)
        return True
    except (AttributeError, ImportError):
        return False


def _stored_dtype(config: Any, records: dict[str, Any]) -> torch.dtype:
    """The precision that most bytes are stored in; for a preset the config's word."""
    if not records:
        return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    sizes: dict[torch.dtype, int] = {}
    for record in records.values():
        if record.dtype.is_floating_point and record.dtype.itemsize > 1:
            sizes[record.dtype] = sizes.get(record.dtype, 0) + record.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
