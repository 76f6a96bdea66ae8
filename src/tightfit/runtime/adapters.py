"""Adapters: what a run learned, kept without the model it was learned beside. A file is there whole or not at all.

It knows what each technique keeps, and PEFT's LoRA files that others made; not when to save, nor what else a checkpoint holds.
"""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tightfit import catalog
from tightfit.contracts import Absorbs, Learns
from tightfit.describe.checkpoint import read_header
from tightfit.describe.digest import digest_of
from tightfit.describe.skeleton import Skeleton, match_origins, persistent_buffers, refuse_faults
from tightfit.formats.image import TensorRecord
from tightfit.runtime.build import Built
from tightfit.runtime.files import copy_companions, read_json, write_json, write_tensors
from tightfit.runtime.weights import read_record, reader
from tightfit.terms.errors import TightfitError
from tightfit.terms.restore import restore

NOTE = "tightfit.json"
FORMAT = 1
"""Raised when an older tightfit could no longer read what a newer one saved."""

_ALTERS_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Ways in which PEFT takes first values out of the base, whose weights it changes then (`init_lora_weights`)."""

_NO_MATTER = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r"} | {
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "init_lora_weights",
    "fan_in_fan_out",
}
"""What of PEFT's config is understood here, or changes nothing that is computed."""


@dataclass(frozen=True)
class Adapter:
    """What lies in a folder. `technique` is empty for a model that was tuned as a whole; `digest` and `architecture` for files of others.

    - `settings`: of the technique; `config`: what the technique, or PEFT, wrote beside the tensors;
    - `base`: the name of the model it was tuned on; `facts`: what else the run noted.
    """

    folder: Path
    technique: str
    settings: Mapping[str, Any]
    base: str
    digest: str
    architecture: str
    config: Mapping[str, Any]
    tensors: Path
    facts: Mapping[str, Any]

    def state(self) -> dict[str, Tensor]:
        """The tensors by the names in the file, on the CPU."""
        return {name: read_record(record) for name, record in read_header(self.tensors).items()}


@dataclass(frozen=True)
class _Note:
    """`tightfit.json`, but for what a run adds."""

    format: int
    base: str
    digest: str
    architecture: str
    technique: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class _Low:
    """What is read of PEFT's config of a LoRA."""

    r: int
    lora_alpha: float
    target_modules: Any
    lora_dropout: float = 0.0


def facts_of(skeleton: Skeleton) -> dict[str, str]:
    """What `save_adapter` must know of the base: its name, a folder in full, and its digest. Once a run, since it reads the base."""
    name = str(Path(skeleton.name).resolve()) if Path(skeleton.name).is_dir() else skeleton.name
    return {"base": name, "digest": digest_of(skeleton)}


def save_adapter(
    model: nn.Module, techniques: Mapping[str, Mapping[str, Any]], folder: Path, facts: Mapping[str, Any], base_folder: str = ""
) -> None:
    """Write what the technique among `techniques` (name → settings) that learns has learned in `model`; else the model itself.

    `facts` are those of `facts_of` and whatever JSON values the run adds. A whole model takes tokenizer files from `base_folder` along.
    Files that lay in `folder` stay as they were until the new ones are whole. Raises `TightfitError`.
    """
    found = [(name, technique) for name, technique in made(techniques).items() if isinstance(technique, Learns)]
    folder.mkdir(parents=True, exist_ok=True)
    name, settings = "", {}
    if found:
        (name, technique), *_ = found
        settings = asdict(technique)
        config = technique.learned_config(model)
        if "peft_type" in config:
            config["base_model_name_or_path"] = facts["base"]
        write_tensors(folder / f"{technique.stem}_model.safetensors", technique.learned_state(model))
        write_json(folder / f"{technique.stem}_config.json", config)
    else:
        _save_whole(model, folder, base_folder)
    note = {"format": FORMAT, "architecture": type(model).__name__, "technique": name, "settings": settings}
    write_json(folder / NOTE, {**facts, **note})


def made(techniques: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The techniques by name."""
    return {name: catalog.make(name, settings) for name, settings in techniques.items()}


def read_adapter(folder: str | Path) -> Adapter:
    """What lies in `folder`: written by `save_adapter`, or a LoRA of PEFT's. Raises `TightfitError` for all that is not whole or known."""
    folder = Path(folder)
    if not folder.is_dir():
        raise TightfitError(f"there is no folder `{folder}`", hint="name the folder that `tightfit tune` or PEFT wrote")
    if (folder / NOTE).exists():
        return _own(folder)
    if (folder / "adapter_config.json").exists():
        return _foreign(folder)
    raise TightfitError(f"`{folder}` holds no adapter", hint=f"`tightfit tune` writes `{NOTE}` there, PEFT `adapter_config.json`")


def check_adapter(adapter: Adapter, skeleton: Skeleton) -> None:
    """Raise `TightfitError` unless the adapter was made for this architecture and these weights, as far as its files tell."""
    architecture = skeleton.model_class.__name__
    if adapter.architecture not in ("", architecture):
        raise TightfitError(
            f"the adapter in `{adapter.folder}` is for a `{adapter.architecture}`, and `{skeleton.name}` is a `{architecture}`",
            hint=f"it was tuned on `{adapter.base}`",
        )
    if adapter.technique and adapter.digest and adapter.digest != digest_of(skeleton):
        raise TightfitError(
            f"the base changed since the adapter in `{adapter.folder}` was made: `{skeleton.name}` has other weights",
            hint=f"use the base it was tuned on, `{adapter.base}`, or tune again",
        )


def load_adapter(built: Built | nn.Module, adapter: Adapter) -> None:
    """Copy what was learned into a model on which the technique was applied, or is now. Raises `TightfitError` where it does not fit."""
    model = built.model if isinstance(built, Built) else built
    if not adapter.technique:
        _load_whole(model, adapter)
        return
    technique = catalog.make(adapter.technique, adapter.settings)
    if not technique.learned_state(model):
        technique.apply(model)
    technique.load_learned(model, adapter.config, adapter.state())


def refuse_unsavable(model: nn.Module) -> None:
    """Raise `TightfitError` where `model`, on `meta` or not, could not be written as a whole under the names that its class reads."""
    from transformers.core_model_loading import revert_weight_conversion

    _refuse_unreadable(model, revert_weight_conversion(model, dict(model.named_parameters()) | persistent_buffers(model)))


def _save_whole(model: Any, folder: Path, base_folder: str) -> None:
    """As `save_pretrained` writes it, under the names of the class's checkpoints. Raises `TightfitError` where these do not lead back."""
    from transformers.core_model_loading import revert_weight_conversion

    if base_folder and folder.resolve() == Path(base_folder).resolve():
        raise TightfitError(f"`{folder}` holds the base itself", hint="write to another folder")
    if any(isinstance(module, Absorbs) for module in model.modules()) or any(parameter.is_meta for parameter in model.parameters()):
        raise TightfitError("a quantized or streamed model cannot be saved as a whole", hint="tune it with an adapter, such as `lora`")
    tensors = revert_weight_conversion(model, dict(model.named_parameters()) | persistent_buffers(model))
    _refuse_unreadable(model, tensors)
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", json.loads(config.to_json_string()))
    copy_companions(base_folder, folder)


def _refuse_unreadable(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    records = {name: TensorRecord("", 0, tensor.nbytes, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    try:
        refuse_faults(model, match_origins(model, records))
    except TightfitError as error:
        raise TightfitError(
            f"a tuned `{type(model).__name__}` cannot be saved under the names that its class reads: {error}",
            hint="tune it with an adapter",
        ) from error


@torch.no_grad()
def _load_whole(model: nn.Module, adapter: Adapter) -> None:
    from tightfit.describe.source import describe

    saved = describe(str(adapter.folder), "tune")
    if saved.model_class.__name__ != type(model).__name__:
        raise TightfitError(f"`{adapter.folder}` holds a `{saved.model_class.__name__}`, and this is a `{type(model).__name__}`")
    read = reader(saved, False)
    for name, parameter in model.named_parameters():
        parameter.copy_(read(name))


def _own(folder: Path) -> Adapter:
    values = read_json(folder / NOTE)
    try:
        if restore(int, values["format"]) > FORMAT:
            raise TightfitError(f"`{folder / NOTE}` was written by a newer tightfit", hint="upgrade tightfit, and read it again")
        note: _Note = restore(_Note, values)
    except (KeyError, TypeError) as error:
        raise TightfitError(
            f"`{folder / NOTE}` is not a note of tightfit: {error}", hint="take it and its neighbours from a copy"
        ) from error
    technique = catalog.make(note.technique, note.settings) if note.technique else None
    if technique is not None and not isinstance(technique, Learns):
        raise TightfitError(f"`{folder / NOTE}` is damaged: `{note.technique}` learns nothing", hint="take it from a copy")
    stem = technique.stem if technique else ""
    tensors = _whole_file(folder / (f"{stem}_model.safetensors" if stem else "model.safetensors"))
    config = read_json(folder / (f"{stem}_config.json" if stem else "config.json"))
    known = {item.name for item in fields(_Note)}
    facts = {key: value for key, value in values.items() if key not in known}
    return Adapter(folder, note.technique, note.settings, note.base, note.digest, note.architecture, config, tensors, facts)


def _foreign(folder: Path) -> Adapter:
    """A LoRA that PEFT, or another tool in PEFT's format, saved."""
    file = folder / "adapter_config.json"
    config = read_json(file)
    _refuse_unlike(file, config)
    try:
        low: _Low = restore(_Low, config)
        where = _where(low.target_modules)
        settings = {"rank": low.r, "alpha": low.lora_alpha, "dropout": low.lora_dropout, "where": where}
        catalog.make("lora", settings)
    except TypeError as error:
        raise TightfitError(f"`{file}` is not a config of a LoRA: {error}", hint="fetch it again from where it comes") from error
    if not (folder / "adapter_model.safetensors").exists() and (folder / "adapter_model.bin").exists():
        raise TightfitError(
            f"`{folder / 'adapter_model.bin'}` is a pickle", hint="load it with PEFT and save it again, which writes safetensors"
        )
    tensors = _whole_file(folder / "adapter_model.safetensors")
    for name in read_header(tensors):
        if not re.fullmatch(r"base_model\.model\..+\.lora_[AB]\.weight", name):
            raise TightfitError(f"`{tensors}` holds `{name}`, which `lora` has not", hint="it takes plain LoRA on linear layers")
    return Adapter(folder, "lora", settings, str(config.get("base_model_name_or_path") or ""), "", "", config, tensors, {})


def _refuse_unlike(file: Path, config: Mapping[str, Any]) -> None:
    """Raise `TightfitError` for what makes another computation of it than `base(x) + alpha / r · B A x`."""
    from peft import LoraConfig

    if config.get("peft_type") != "LORA":
        raise TightfitError(f"`{file}` is of the type `{config.get('peft_type')}`", hint="tightfit reads PEFT's `LORA`")
    plain = LoraConfig().to_dict()
    other = sorted(key for key, value in config.items() if key not in _NO_MATTER and value and value != plain.get(key))
    if str(config.get("init_lora_weights")).partition("_niter")[0].lower() in _ALTERS_BASE:
        other.append("init_lora_weights")
    if other:
        shown = ", ".join(f"{key}={config[key]}" for key in other)
        raise TightfitError(
            f"`{file}` asks for what `lora` cannot do: `{shown}`", hint="merge it with PEFT's `merge_and_unload`, and name the merged model"
        )


def _where(target_modules: Any) -> str:
    """PEFT takes the ends of paths, or a regular expression on whole ones."""
    if target_modules == "all-linear":
        return ""
    if isinstance(target_modules, str):
        return rf"\A(?:{target_modules})\Z"
    if not target_modules:
        raise TypeError("no `target_modules`")
    return rf"(?:^|\.)(?:{'|'.join(re.escape(restore(str, name)) for name in sorted(target_modules))})$"


def _whole_file(file: Path) -> Path:
    if not file.exists():
        raise TightfitError(f"`{file.name}` is missing from `{file.parent}`", hint="take the folder from a copy, or tune again")
    read_header(file)
    return file
