"""Quantize: solve one block of a model after the other for the text that it is fed, and write each as soon as it is done.

No more than one dense block is in memory, its Hessians, and the hidden states of the calibration text. What is written lies in a folder
beside the wished one until all of it is there; a run that was stopped goes on at the first block that is missing.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tightfit.contracts import Absorbs, Solves
from tightfit.describe.blocks import block_lists, blocks_of
from tightfit.describe.digest import digest_of
from tightfit.describe.skeleton import Skeleton
from tightfit.formats.experts import QuantizedExperts, matrices_in
from tightfit.formats.linear import QuantizedLinear, replace
from tightfit.formats.stored import StoredFormat
from tightfit.runtime.calibrate import Call, Door, Walk, advance, alike, copied, first_states, hessian_of, twin_of
from tightfit.runtime.experts import routed_of, solve_experts
from tightfit.runtime.files import copy_companions, read_json, settle, write_json, write_tensors
from tightfit.runtime.placing import Placing
from tightfit.runtime.solve import absorb, solve_linear
from tightfit.terms.errors import TightfitError

UNFINISHED = ".unfinished"
"""What the folder of a run that is not done is called beyond its name."""

NOTE = "quantize.json"
"""What a run that goes on must agree with."""

_AGREED = {"technique": "technique or setting", "model": "model", "text": "text, or other samples of it"}
"""What the note holds, in words."""

STATES = "states.bin"
"""The hidden states, where they rest on the disk."""

Progress = Callable[[int, int, str], None]
"""Told (layers done, layers in all, the layer's path) after each layer; each matrix of fused experts counts as one."""


@dataclass
class Job:
    """One model on its way into few bits. `rows` samples go through a block at once; hidden states may rest `on_disk`.

    `rounded` experts are those of the blocks done here that too little of the text reached to solve them.
    """

    skeleton: Skeleton
    technique: Solves
    samples: Tensor  # (samples, tokens) of token ids
    rows: int
    device: torch.device
    on_disk: bool = False
    progress: Progress = lambda done, whole, layer: None
    rounded: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.model = self.skeleton.meta_model().requires_grad_(False)  # dense; one block at a time has its weights
        self.target = self.skeleton.meta_model()  # of which only the quantized layers are taken
        self.technique.apply(self.target)  # type: ignore[attr-defined]
        self.placing = Placing(self.model, self.skeleton, self.device)
        self.blocks = blocks_of(self.model)
        self.layers = quantized_layers(self.target)
        self.whole, self.done = sum(matrices_in(self.target.get_submodule(path)) for path in self.layers), 0


def quantize(job: Job, folder: Path, resume: bool = False) -> None:
    """Write the model in few bits to `folder`, which does not exist yet. Raises `TightfitError`; what was done is kept for `resume`."""
    refuse_model(job.skeleton, job.model)
    folder = folder.resolve()
    work = _begin(job, folder, resume)
    with torch.inference_mode():
        job.placing.place_outside()
        walk = Walk(job.model, job.blocks, job.samples, job.rows, job.device, work / STATES if job.on_disk else None)
        states, calls = first_states(walk) if job.technique.needs_inputs() else (None, [])
        dense_states = copied(walk, states) if states is not None and job.technique.needs_dense_inputs() else None
        for position in range(len(job.blocks)):
            _do_block(job, walk, position, work / _shard(position, len(job.blocks)), states, dense_states, calls)
        outside = _outside(job)
    write_tensors(work / _shard(len(job.blocks), len(job.blocks)), outside)
    _finish(job, work, folder)


def refuse_model(skeleton: Skeleton, model: nn.Module) -> None:
    """Raise `TightfitError` for models whose blocks cannot be walked through one after the other, and for quantized ones."""
    if skeleton.stored:
        raise TightfitError(
            f"`{skeleton.name}` is already quantized, to {skeleton.stored.bits} bits",
            hint="name the original model: each rounding adds to the last",
        )
    if model.config.is_encoder_decoder or len(block_lists(model)) != 1:
        raise TightfitError(
            f"`{type(model).__name__}` has {len(block_lists(model))} stacks of blocks; `quantize` walks through one",
            hint="decoders such as Llama and encoders such as BERT have one",
        )
    if skeleton.live is not None:
        raise TightfitError("a live model is not quantized to files", hint="save it with `save_pretrained`, and name the folder")


def quantized_layers(model: nn.Module) -> list[str]:
    """The paths of the layers that hold few bits."""
    return [path for path, module in model.named_modules() if isinstance(module, QuantizedLinear | QuantizedExperts)]


def _begin(job: Job, folder: Path, resume: bool) -> Path:
    """The folder to work in, with a note of what is being made. Refuses a folder in use, and to go on with something else."""
    work = folder.with_name(folder.name + UNFINISHED)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TightfitError(f"`{folder}` is there already", hint="name a folder that does not exist, or remove it first")
    note = {"technique": repr(job.technique), "model": digest_of(job.skeleton), "text": _digest(job.samples)}
    if work.exists() and not resume:
        raise TightfitError(f"`{work}` holds a run that was not finished", hint="go on with `--resume`, or remove the folder")
    if not (work / NOTE).exists() and any(work.glob("*.safetensors")):
        raise TightfitError(f"`{work}` does not say what it was made with", hint="remove the folder, and begin anew")
    if work.exists() and (work / NOTE).exists():
        found = read_json(work / NOTE)
        other = [name for name in note if found.get(name) != note[name]]
        if other:
            raise TightfitError(
                f"the unfinished run has another {' and another '.join(_AGREED[name] for name in other)}",
                hint=f"resume with the same, or remove `{work}`",
            )
        return work
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TightfitError(f"cannot make `{work}`: {error.strerror}", hint="name a folder that you may write to") from error
    write_json(work / NOTE, note)
    return work


def _digest(samples: Tensor) -> str:
    return hashlib.sha256(samples.contiguous().numpy().tobytes()).hexdigest()[:16]


def _shard(position: int, blocks: int) -> str:
    return f"model-{position + 1:05d}-of-{blocks + 1:05d}.safetensors"


def _do_block(
    job: Job, walk: Walk, position: int, shard: Path, states: Tensor | None, dense_states: Tensor | None, calls: list[Call]
) -> None:
    """Solve a block and write it, or take it from an earlier run's shard; then lead the states through it, and the dense ones as it was."""
    path, block = job.blocks[position]
    if not shard.exists() or dense_states is not None:
        job.placing.place_block(path)
    door = None if states is None else Door(block, states, calls[position])
    dense = None if dense_states is None else Door(twin_of(block), dense_states, calls[position])
    if shard.exists():
        _fill_from(job, path, block, shard)
    else:
        _solve_block(job, walk, position, door, dense)
        write_tensors(shard, {f"{path}.{name}": tensor for name, tensor in block.state_dict().items()})
    for each in (door, dense):
        if each:
            advance(walk, each)
    block.to("meta")


def _solve_block(job: Job, walk: Walk, position: int, door: Door | None, dense: Door | None) -> None:
    """Layers that are fed alike at once, in the order in which they are called; those after see what those before became."""
    path, block = job.blocks[position]
    inside = _inside(job, path)
    for names in alike(walk, door, inside) if door else [inside]:
        linear = [name for name in names if isinstance(job.target.get_submodule(f"{path}.{name}"), QuantizedLinear)]
        if linear:
            _solve_linear(job, walk, path, block, linear, door, dense)
        for name in (name for name in names if door and name not in linear):
            _solve_experts(job, walk, path, block, name, door, dense)
    for name in inside:
        if not isinstance(block.get_submodule(name), Absorbs):  # the first samples do not reach it, or nobody asks what it is fed
            layer = job.target.get_submodule(f"{path}.{name}")
            absorb(f"{path}.{name}", block.get_submodule(name), layer)
            replace(block, name, layer)
            _told(job, f"{path}.{name}", matrices_in(layer))


def _inside(job: Job, path: str) -> list[str]:
    return [layer.removeprefix(f"{path}.") for layer in job.layers if layer.startswith(f"{path}.")]


def _solve_linear(job: Job, walk: Walk, path: str, block: nn.Module, names: list[str], door: Door | None, dense: Door | None) -> None:
    hessian, cross = hessian_of(walk, names[0], door, dense) if door else (torch.empty(0), None)
    for name in names:
        layer = job.target.get_submodule(f"{path}.{name}")
        solve_linear(job.technique, f"{path}.{name}", block.get_submodule(name), layer, hessian, cross)
        replace(block, name, layer)
        _told(job, f"{path}.{name}")


def _solve_experts(job: Job, walk: Walk, path: str, block: nn.Module, name: str, door: Door, dense: Door | None) -> None:
    layer, routed = job.target.get_submodule(f"{path}.{name}"), routed_of(walk, name, door, dense)
    if routed:
        job.rounded += solve_experts(job.technique, f"{path}.{name}", block.get_submodule(name), layer, routed, partial(_told, job))
        replace(block, name, layer)
    else:
        job.rounded += layer.num_experts


def _told(job: Job, layer: str, matrices: int = 1) -> None:
    job.done += matrices
    job.progress(job.done, job.whole, layer)


def _fill_from(job: Job, path: str, block: nn.Module, shard: Path) -> None:
    """The block that an earlier run finished."""
    from safetensors.torch import load_file

    for name in _inside(job, path):
        layer = job.target.get_submodule(f"{path}.{name}")
        replace(block, name, layer)
        _told(job, f"{path}.{name}", matrices_in(layer))
    for name, tensor in load_file(shard, device=str(job.device)).items():
        inside = name.removeprefix(f"{path}.")
        parent, _, leaf = inside.rpartition(".")
        owner = block.get_submodule(parent)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[leaf] = tensor


def _outside(job: Job) -> dict[str, Tensor]:
    """Tied names once."""
    inside, found, seen = tuple(f"{path}." for path, _ in job.blocks), {}, set()
    for name, tensor in job.model.state_dict(keep_vars=True).items():
        if not name.startswith(inside) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor.detach()
    return found


def _finish(job: Job, work: Path, folder: Path) -> None:
    """Index, config and tokenizer; then the folder gets its name."""
    from tightfit.describe.checkpoint import INDEX, read_header

    places, total = {}, 0
    for position in range(len(job.blocks) + 1):
        shard = _shard(position, len(job.blocks))
        records = read_header(work / shard)
        places |= dict.fromkeys(records, shard)
        total += sum(record.nbytes for record in records.values())
    write_json(work / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    config = json.loads(job.skeleton.config.to_json_string(use_diff=False))
    config |= {"quantization_config": StoredFormat.of(job.target).note(), "dtype": str(job.skeleton.dtype).removeprefix("torch.")}
    config["architectures"] = [job.skeleton.model_class.__name__]
    write_json(work / "config.json", config)
    copy_companions(job.skeleton.folder, work)
    for states in work.glob(f"*{STATES}"):
        states.unlink()
    if folder.exists():
        folder.rmdir()
    os.replace(work, folder)
    settle(folder.parent)
    (folder / NOTE).unlink()
