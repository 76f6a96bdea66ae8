"""Weigh: the bytes of every block and of what stands outside them, once techniques have changed the model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from tightfit.contracts import Absorbs, Beside, Transform
from tightfit.describe.blocks import adapted_name, blocks_of, names_in_files
from tightfit.describe.skeleton import Skeleton
from tightfit.formats.experts import QuantizedExperts
from tightfit.formats.image import PIECE_BYTES, READERS, BlockImage, image_in_files, staging_bytes
from tightfit.formats.linear import QuantizedLinear

ENCODING = 2.5
"""Bytes that a codec holds while it encodes, over the dense matrix's; measured with the allocator's records: int8 1.5, nf4 2.4."""

RECORD_BYTES = 3_200
"""Of a trained tensor beside its storages: the parameter, its gradient, its entries in the optimizer; measured with many small ones."""


@dataclass(frozen=True)
class Weights:
    """Bytes as they will rest.

    Scratch is alive beside the resting weights while one dense tensor after the other is read: `read_scratch` where they are read,
    in RAM, and `encode_scratch` where they are encoded, on the compute tier. Never both at once.
    """

    blocks: tuple[int, ...]  # what may take turns: of each block the frozen tensors
    outside: int  # what always stays: all else, what is trained inside blocks included
    stored: int  # the dense checkpoint
    changed: bool  # blocks rest in another form than they are stored, if they are at all, so streaming them needs a spill file
    take_turns: bool  # every block has frozen parameters
    read_scratch: int
    encode_scratch: int
    passing: int  # what passes through RAM on its way to a GPU: the largest tensor with its parts, and the readers' buffers
    staging: int  # what readers hold beside the slots while blocks stream straight from the checkpoint
    records: int  # what Python and the optimizer note of each trained tensor, which no storage shows
    extras: frozenset[str]  # what the process holds beside tensors and what every run has, by the names of `Machine.overhead`

    def load_scratch(self, fast: str) -> int:
        """The most that is alive beside the resting weights on the compute tier `fast` while they are read."""
        return self.encode_scratch if fast == "gpu" else max(self.encode_scratch, self.read_scratch)


def weigh(skeleton: Skeleton, techniques: Iterable[Transform], random_weights: bool = False, tuned: bool = False) -> Weights:
    """Apply `techniques` to the meta model and weigh it. Tied tensors count once. Only what is `tuned` has trainable parameters."""
    model = skeleton.meta_model()
    if not tuned:
        model.requires_grad_(False)
    dense, stored = dict(model.named_parameters()), {path for path, module in model.named_modules() if isinstance(module, Absorbs)}
    inside = [[f"{path}.{name}" for name in names_in_files(block)] for path, block in blocks_of(model)]
    beside = {} if random_weights else read_beside(skeleton, model)
    for technique in sorted(techniques, key=lambda technique: technique.stage):
        technique.apply(model)
    blocks = [block for _, block in blocks_of(model)]
    encoded = _encoded(model, dense, stored)
    images = [_image(skeleton, names, beside) for names in inside]
    changed = random_weights or bool(encoded) or any(image is None for image in images)
    turns = [sum(tensor_bytes(tensor) for tensor in _that_takes_turns(block, changed)) for block in blocks]
    return Weights(
        blocks=tuple(turns),
        outside=sum(tensor_bytes(tensor) for tensor in [*model.parameters(), *model.buffers()]) - sum(turns),
        stored=sum(tensor_bytes(parameter) for parameter in dense.values()),
        changed=changed,
        take_turns=all(any(not parameter.requires_grad for parameter in block.parameters()) for block in blocks),
        read_scratch=_read_scratch(dense, beside, encoded),
        encode_scratch=max((_encode_scratch(dense[name]) for name in encoded), default=0),
        passing=max((_passing(dense[name], beside.get(name, 0)) for name in dense), default=0) + READERS * PIECE_BYTES,
        staging=0 if changed else max((staging_bytes(image) for image in images if image), default=0),
        records=RECORD_BYTES * sum(parameter.requires_grad for parameter in model.parameters()) if tuned else 0,
        extras=_extras(model, tuned),
    )


def read_beside(skeleton: Skeleton, model: nn.Module) -> dict[str, int]:
    """Bytes that are alive beside a parameter of the dense meta `model` while it is read, where it is not read as it is stored.

    They are the parts that it is joined from (fused experts), or it in another precision. A checkpoint tells; of a shape without
    weights transformers' own mapping does, as if `save_pretrained` had written it.
    """
    dense, found = dict(model.named_parameters()), {}
    for name, origin in skeleton.origins.items():
        stored = sum(record.nbytes for record in origin.records)
        if name in dense and origin.conversion is not None:
            found[name] = 2 * stored - tensor_bytes(dense[name])  # joined in the stored precision
        elif name in dense and origin.records[0].dtype != dense[name].dtype:
            found[name] = stored
    if skeleton.origins or skeleton.live is not None:
        return found
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    turns = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    saving = [turn.reverse_transform() for turn in turns if isinstance(turn, WeightConverter)]
    joined = [name for name in dense if any(turn.rename_source_key(name)[1] is not None for turn in saving)]
    return {name: tensor_bytes(dense[name]) for name in joined}


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of one tensor, on any device."""
    return tensor.numel() * tensor.element_size()


def _that_takes_turns(block: nn.Module, changed: bool) -> list[Tensor]:
    """Frozen parameters, and their tables and scales; all buffers where the block is written to a spill file."""
    frozen: list[Tensor] = [parameter for parameter in block.parameters() if not parameter.requires_grad]
    stored = set(names_in_files(block))
    kept = [buffer for name, buffer in block.named_buffers() if changed or name in stored]
    return [*frozen, *kept]


def _image(skeleton: Skeleton, names: list[str], beside: Mapping[str, int]) -> BlockImage | None:
    """The block of these parameters as it lies in the checkpoint; None where it cannot stream from there.

    Of a shape without weights nothing more is known, so it counts as lying well.
    """
    if skeleton.live is not None or not beside.keys().isdisjoint(names):
        return None
    if not skeleton.origins:
        return BlockImage((), (), 0)
    if any(name not in skeleton.origins for name in names):
        return None
    return image_in_files({name: skeleton.origins[name].records[0] for name in names})


def _encoded(model: nn.Module, dense: Mapping[str, nn.Parameter], stored: set[str]) -> set[str]:
    """Dense parameters that a module keeps in a form of its own; `stored` modules take theirs as the checkpoint has it."""
    owners = {path for path, module in model.named_modules() if isinstance(module, Absorbs)} - stored
    return {name for name in dense if adapted_name(model, name).rpartition(".")[0] in owners}


def _read_scratch(dense: Mapping[str, nn.Parameter], beside: Mapping[str, int], encoded: set[str]) -> int:
    """What is read goes straight to its place, unless it will be encoded, when its place is another."""
    return max((size + (tensor_bytes(dense[name]) if name in encoded else 0) for name, size in beside.items()), default=0)


def _encode_scratch(parameter: nn.Parameter) -> int:
    """The dense tensor, and what the codec takes for one matrix of it."""
    matrix = tensor_bytes(parameter) // (parameter.shape[0] if parameter.dim() == 3 else 1)
    return tensor_bytes(parameter) + int(ENCODING * matrix)


def _passing(parameter: nn.Parameter, beside: int) -> int:
    """The whole with the parts that it is joined from."""
    return tensor_bytes(parameter) + beside


def _extras(model: nn.Module, tuned: bool) -> frozenset[str]:
    """The foreign libraries that quantized and adapted modules load, and the routing where tokens choose experts."""
    found = {module.codec.library for module in model.modules() if isinstance(module, QuantizedLinear | QuantizedExperts)} - {""}
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        found.add("peft")
    if tuned and any(isinstance(module, Beside) for module in model.modules()):
        found.add("beside")
    if any(path.rpartition(".")[2] == "experts" for path, _ in model.named_modules()):
        found.add("routing_tune" if tuned else "routing")
    return frozenset(found)
