"""Placing: each weight of a model on paper straight to its place in the model that will run; what no file holds is computed."""

import torch
from torch import Tensor, nn

from tightfit.contracts import Absorbs
from tightfit.describe.blocks import adapted_name, blocks_of, names_in_files
from tightfit.describe.skeleton import Skeleton, persistent_buffers
from tightfit.formats.image import BlockImage, image_in_files
from tightfit.runtime.weights import reader
from tightfit.terms.errors import TightfitError


class Placing:
    """The dense parameters of the model on paper, and the places in the planned model that take them."""

    def __init__(self, model: nn.Module, skeleton: Skeleton, device: torch.device, random_weights: bool = False) -> None:
        self.model = model
        self.skeleton = skeleton
        self.device = device
        self.random_weights = random_weights
        self.dense = skeleton.meta_model()
        self.read = reader(skeleton, random_weights)
        self.stored = {
            f"{path}.{name}" for path, module in self.dense.named_modules() if isinstance(module, Absorbs) for name in module._parameters
        }
        self.done = 0
        self.whole = sum(_bytes(parameter) for parameter in self.dense.parameters())
        self.names: dict[int, list[str]] = {}
        for name, parameter in self.dense.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), []).append(name)

    def progress(self) -> tuple[int, int]:
        """Bytes placed so far, and in all."""
        return self.done, self.whole

    def place_outside(self) -> None:
        """Place what belongs to no block, tied names together, and all buffers: those that no checkpoint holds are computed."""
        inside = tuple(f"{path}." for path, _ in blocks_of(self.dense))
        for names in self.names.values():
            if not names[0].startswith(inside):
                self._place(names)
        self._place_buffers()
        restore_buffers(self.model, self.device)

    def place_block(self, path: str) -> None:
        """Place all parameters of the block at `path`. On the compute device, where encoding is fast, even if it leaves again."""
        for names in self.names.values():
            if names[0].startswith(f"{path}."):
                self._place(names)

    def image_in_files(self, path: str, block: nn.Module) -> BlockImage | None:
        """The image of `block` straight in the checkpoint; None when it is quantized, converted, made up, or of another precision."""
        origins, stored = self.skeleton.origins, self.dense.get_submodule(path)
        state = stored.state_dict(keep_vars=True)
        dense = {name: state[name] for name in names_in_files(stored)}
        found = {name: origins.get(f"{path}.{name}") for name in dense}
        plain = all(origin and origin.conversion is None and origin.records[0].dtype == dense[name].dtype for name, origin in found.items())
        if self.random_weights or not plain or self._absorbs(path, block):
            return None
        image = image_in_files({adapted_name(block, name): origin.records[0] for name, origin in found.items() if origin})
        if image is not None:
            self.done += sum(_bytes(parameter) for parameter in dense.values())
        return image

    def _absorbs(self, path: str, block: nn.Module) -> bool:
        """Whether a weight of `block` takes another form than it has in the checkpoint."""
        owners = [f"{path}.{inside}" for inside, module in block.named_modules() if isinstance(module, Absorbs)]
        return any(not isinstance(self.dense.get_submodule(owner.replace(".base_layer", "")), Absorbs) for owner in owners)

    def _place(self, names: list[str]) -> None:
        dense = self.read(names[0]).to(self.device)
        shared = nn.Parameter(dense, requires_grad=False)
        for name in names:
            parent, _, leaf = adapted_name(self.model, name).rpartition(".")
            owner = self.model.get_submodule(parent)
            if isinstance(owner, Absorbs) and name not in self.stored:
                self._absorb(owner, name, leaf, dense)
            else:
                shared.requires_grad_(shared.requires_grad or owner.get_parameter(leaf).requires_grad)
                owner._parameters[leaf] = shared
        self.done += _bytes(dense)

    def _place_buffers(self) -> None:
        """Small ones, so those of all blocks at once. Made-up weights leave them to be computed, as they are before training."""
        for name in persistent_buffers(self.dense) if not self.random_weights else ():
            if name in self.skeleton.origins or self.skeleton.live is not None:
                parent, _, leaf = adapted_name(self.model, name).rpartition(".")
                self.model.get_submodule(parent)._buffers[leaf] = self.read(name).to(self.device)

    def _absorb(self, owner: Absorbs, name: str, leaf: str, dense: Tensor) -> None:
        try:
            owner.absorb(leaf, dense)
        except TightfitError as error:
            raise TightfitError(f"`{name}`: {error}", hint=error.hint) from error


def restore_buffers(model: nn.Module, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies, position tables), as transformers does after loading.

    On `meta` they have no values; each module's own initialisation makes them anew, what was read is left alone.
    """
    for tensor in (*model.parameters(), *(buffer for buffer in model.buffers() if not buffer.is_meta)):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for module in model.modules():
        lost = {name: buffer for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
        if lost and not isinstance(module, Absorbs):
            for name, buffer in lost.items():
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
            model._init_weights(module)
            for name in lost:
                module._buffers[name] = module._buffers[name].to(device)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
