"""Skeleton: a model on paper: its config, its class, its meta module, and where each weight lies."""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tightfit.describe.blocks import blocks_of
from tightfit.describe.ties import untie
from tightfit.formats.image import TensorRecord
from tightfit.formats.stored import StoredFormat
from tightfit.terms.errors import TightfitError

SHOWN = 8
"""Faults of one checkpoint that are listed below the first line."""


@dataclass(frozen=True)
class Origin:
    """Where one parameter or buffer comes from: its records in the checkpoint, and the conversion that joins them (none: as it is)."""

    records: tuple[TensorRecord, ...]
    conversion: Any = None
    sources: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Skeleton:
    """What is known of a model before a weight is read.

    `origins` maps the names of the module's parameters and persistent buffers to the checkpoint; empty for presets, which have no
    weights. `untied` names weights that the config ties and the checkpoint does not.
    `live` is the module itself when a live one was described: then its own tensors are the weights. `stored` says which layers lie in
    few bits in the checkpoint; the meta module has them so.
    """

    name: str
    config: Any
    model_class: type[nn.Module]
    dtype: torch.dtype
    folder: str = ""
    origins: Mapping[str, Origin] = field(default_factory=dict)
    untied: tuple[str, ...] = ()
    live: nn.Module | None = None
    stored: StoredFormat | None = None

    def meta_model(self) -> nn.Module:
        """A fresh module on `meta`, each tensor in the precision it is loaded in, in evaluation mode. Takes no memory."""
        if self.live is not None:
            return meta_copy(self.live)
        from transformers.initialization import no_init_weights

        with torch.device("meta"), no_init_weights():  # drawing no numbers takes time too, with thousands of experts
            model = self.model_class._from_config(copy.deepcopy(self.config), dtype=self.dtype)
        model.eval()
        model.tie_weights(recompute_mapping=False)
        untie(model, self.untied)
        keep_precise(model, self.dtype)
        line_up_head(model)
        if self.stored:
            self.stored.prepare(model)
        return model

    def weight_bytes(self) -> int:
        """Bytes of all parameters in the stored precision; tied ones once."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.meta_model().parameters())

    def block_bytes(self) -> list[int]:
        """Bytes of each repeated block in the stored precision, in order."""
        return [
            sum(parameter.numel() * parameter.element_size() for parameter in block.parameters())
            for _, block in blocks_of(self.meta_model())
        ]


def keep_precise(model: nn.Module, dtype: torch.dtype) -> None:
    """Give float32 to the tensors that `from_pretrained` loads so into a model of 16 bits, by parts of their names (T5's `wo`)."""
    plan = model._get_dtype_plan(dtype)
    if plan:
        kept = re.compile("|".join(part.replace("*", ".*") for part in plan))
        for name, tensor in model.state_dict(keep_vars=True).items():
            if kept.search(name) and tensor.dtype.is_floating_point:
                tensor.data = tensor.data.float()


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a checkpoint holds beside the parameters, by name (the correction of a router's scores, …)."""
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if not isinstance(tensor, nn.Parameter)}


def line_up_head(model: nn.Module) -> None:
    """Give the head its input in one piece.

    `generate` hands it the last position as a slice, for which torch's bfloat16 product on the CPU copies the whole weight,
    once for every sequence of the batch (seen with torch 2.13; 125 MiB for a vocabulary of 32,000 and a width of 2,048).
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda _module, arguments: tuple(_in_one_piece(argument) for argument in arguments))


def _in_one_piece(tensor: Tensor) -> Tensor:
    """A slice of one position counts as contiguous, whatever its strides; only a copy has plain ones."""
    sliced = tensor.dim() > 1 and tensor.numel() and tensor.stride(0) != tensor[0].numel()
    return tensor.clone(memory_format=torch.contiguous_format) if sliced else tensor


def meta_copy(module: nn.Module) -> nn.Module:
    """A deep copy of `module` whose tensors are on `meta`; the original's memory is never doubled."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


def match_origins(model: nn.Module, records: Mapping[str, TensorRecord]) -> dict[str, Origin]:
    """Find each parameter and persistent buffer of the meta `model` in the checkpoint, under the names and fusions of transformers."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    wanted = model.state_dict()
    gathered: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(records, key=_natural):
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
        gathered.setdefault(target, []).append((key, pattern or ""))
    origins = {}
    for target, sources in gathered.items():
        found = tuple(records[key] for key, _ in sources)
        origins[target] = Origin(found, by_pattern.get(sources[0][1]), tuple(sources))
    return origins


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def refuse_faults(model: nn.Module, origins: Mapping[str, Origin]) -> None:
    """Raise `TightfitError` when weights of the meta `model` are missing, or when a shape or dtype disagrees with the config."""
    tied = set(model.all_tied_weights_keys)
    faults = []
    for name, tensor in (*model.named_parameters(), *persistent_buffers(model).items()):
        origin = origins.get(name)
        if origin is None:
            if name not in tied and not _may_be_missing(model, name) and not any(other in origins for other in _same(model, tensor)):
                faults.append(f"`{name}` is not in the checkpoint")
        elif origin.conversion is None and origin.records[0].shape != tuple(tensor.shape):
            faults.append(f"`{name}` has shape {list(origin.records[0].shape)}, the config says {list(tensor.shape)}")
        elif tensor.dtype.is_floating_point and (wrong := _unlike_weights(origin)):
            faults.append(f"`{name}` is stored as {str(wrong[0]).removeprefix('torch.')}, which is not a plain weight")
        elif origin.conversion is not None:
            faults += _parts_faults(name, tensor, origin)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise TightfitError(
            f"the checkpoint does not match the config: {faults[0]}{more}",
            hint="is `config.json` of this model?",
            details="\n".join([*faults[:SHOWN], *["…"] * (len(faults) > SHOWN)]) if len(faults) > 1 else "",
        )


def _may_be_missing(model: nn.Module, name: str) -> bool:
    """Whether it is a buffer that transformers computes where a checkpoint has none, without a word (BART's `final_logits_bias`)."""
    patterns = model._keys_to_ignore_on_load_missing or ()
    return any(re.search(pattern, name) for pattern in patterns) and name in persistent_buffers(model)


def _unlike_weights(origin: Origin) -> list[torch.dtype]:
    return [record.dtype for record in origin.records if not record.dtype.is_floating_point or record.dtype.itemsize < 2]


def _parts_faults(name: str, parameter: Tensor, origin: Origin) -> list[str]:
    """Parts that are joined must be alike under each pattern (all experts' `up_proj`), and make up the whole."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for (_, pattern), record in zip(origin.sources, origin.records, strict=True):
        shapes.setdefault(pattern, set()).add(record.shape)
    if any(len(found) > 1 for found in shapes.values()):
        return [f"the parts of `{name}` have unlike shapes"]
    elements = sum(torch.Size(record.shape).numel() for record in origin.records)
    if elements != parameter.numel():
        return [f"the {len(origin.records)} parts of `{name}` have {elements} elements, the config says {parameter.numel()}"]
    return []


def _same(model: nn.Module, parameter: Tensor) -> list[str]:
    return [name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter]
