"""Law 4: the backward pass keeps no copy of a frozen weight, decoded or cast, in any set of techniques that tune on a frozen base."""

import weakref
from contextlib import ExitStack
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from families import CONFIGS, ids, make
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import tightfit
from tightfit import catalog, steps
from tightfit.contracts import Stage
from tightfit.describe.blocks import block_lists, blocks_of
from tightfit.formats.experts import QuantizedExperts
from tightfit.formats.linear import QuantizedLinear, replace
from tightfit.rehearse.fake import inputs_for
from tightfit.rehearse.rehearsal import measure
from tightfit.terms.errors import TightfitError
from tightfit.terms.workload import Workload

SETTINGS = {
    "lora": "lora:rank=3",
    "dylora": "dylora:rank=3",
    "side": "side:reduction=4,rank=3",
    "chunked_loss": "chunked_loss:tokens=13",
    "nf4": "nf4:layout=standard",
}
"""Sizes that no frozen weight has, and a layout that does not depend on the machine."""

REFUSED = [("side", "t5"), ("side", "vit"), ("chunked_loss", "vit")]
"""What a technique refuses in one line."""

ADAPTERS, FORMATS = (
    [name for name, kind in catalog.techniques().items() if kind.stage == stage] for stage in (Stage.ADAPT, Stage.QUANTIZE)
)

TOKENS = 29
"""Divides the size of every activation and of no weight, so that the two are not taken for one another. More than the kernels for few
tokens take, and less than half a width, so that an expert's share of the tokens cannot be as large as its weight."""

IMAGES = 5
"""As `TOKENS`, for a model that takes pictures."""

SMALLEST = 2048
"""Elements from which a frozen matrix counts: the smallest matrix of a block. Below it are routers and relative positions."""


def named(*techniques: str) -> list[str]:
    """The techniques with their settings; empty names are left out."""
    return [SETTINGS.get(name, name) for name in techniques if name]


def dense_sizes(model: nn.Module) -> set[int]:
    """Numbers of elements that a dense copy of a frozen weight could have: of a matrix, of a stack of experts, of one of the stack."""
    shapes: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            shapes.append(module.shape)
        elif isinstance(module, QuantizedExperts):
            shapes += [(module.num_experts, *shape) for shape in module.shapes.values()]
    shapes += [tuple(found.shape) for found in model.parameters() if found.is_floating_point() and not found.requires_grad]
    sizes = {torch.Size(shape[start:]).numel() for shape in shapes for start in range(len(shape) - 1)}
    return {size for size in sizes if size >= SMALLEST}


class Copies(TorchDispatchMode):
    """Watches for floating-point tensors as large as a frozen weight that are not the model's own: `saved` and, at one time, `alive`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        own = [*model.parameters(), *model.buffers()]
        self.sizes = dense_sizes(model)
        assert not self.sizes & {tensor.numel() for tensor in own if tensor.requires_grad}
        self.own = {tensor.untyped_storage()._cdata for tensor in own}
        self.living: set[int] = set()
        self.alive = 0
        self.saved: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and self.is_copy(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.living:
                    self.living.add(storage._cdata)
                    weakref.finalize(storage, self.living.remove, storage._cdata).atexit = False
                self.alive = max(self.alive, len(self.living))
        return result

    def is_copy(self, tensor: Tensor) -> bool:
        """Whether `tensor`, or the storage that it is a part of, is as large as a frozen weight, and not the model's own."""
        storage = tensor.untyped_storage()
        sizes = {tensor.numel(), storage.nbytes() // tensor.element_size()}
        return tensor.is_floating_point() and storage._cdata not in self.own and bool(sizes & self.sizes)

    def pack(self, tensor: Tensor) -> Tensor:
        """A hook for what autograd saves."""
        if self.is_copy(tensor):
            self.saved.append(tuple(tensor.shape))
        return tensor


def watched_step(model: nn.Module, workload: Workload) -> Copies:
    """Forward and backward pass under watch, on trained parameters."""
    model.zero_grad()
    batch, copies = inputs_for(model, workload, ids), Copies(model)
    with copies, torch.autograd.graph.saved_tensors_hooks(copies.pack, lambda tensor: tensor):
        steps.loss_of(model, batch).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and any(parameter.grad is not None for parameter in trained)
    return copies


def workload_of(family: str) -> Workload:
    """One row of tokens, or a few pictures."""
    return Workload("tune", IMAGES, 1) if family == "vit" else Workload("tune", 1, TOKENS)


def changed(family: str, techniques: list[str], dtype: torch.dtype | None = None, depth: int = 1) -> nn.Module:
    """The family's model with the techniques, and one block in each stack, since they are alike."""
    model = make(family, dtype)
    for _, stack in block_lists(model):
        del stack[depth:]
    model.config.num_hidden_layers = depth
    return tightfit.apply(model, techniques)


def test_every_way_to_tune_is_walked_over():
    """A new adapter must be given settings here, so that its own matrices are not mistaken for copies."""
    assert {"lora", "side"} <= set(ADAPTERS) <= set(SETTINGS)
    assert {"int8", "nf4", "rtn", "lean"} <= set(FORMATS)


def held(copies: Copies, base: str) -> bool:
    """Nothing was saved, and at no time was there more than the one copy with which a product is taken, nor in the recomputed pass."""
    return copies.saved == [] and copies.alive <= (1 if base else 0)


@pytest.mark.parametrize("base", ["", *FORMATS])
@pytest.mark.parametrize(("family", "adapter"), [pair for pair in product(CONFIGS, ADAPTERS) if pair[::-1] not in REFUSED])
def test_no_copy_of_a_frozen_weight_is_kept(family, adapter, base):
    """By the adapter alone, with `recompute`, and with `chunked_loss` too where there is a head for it."""
    model = changed(family, named(adapter, base))
    for beside in ("", "recompute", "chunked_loss"):
        if (beside, family) not in REFUSED:
            tightfit.apply(model, named(beside))
            assert held(watched_step(model, workload_of(family)), base), beside


@pytest.mark.parametrize(("technique", "family"), REFUSED)
def test_what_is_left_out_is_refused(technique, family):
    with pytest.raises(TightfitError):
        tightfit.apply(make(family), named(technique))


@pytest.mark.parametrize("base", ["", *FORMATS])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_nor_with_chunked_loss_alone(adapter, base):
    assert held(watched_step(changed("llama-tied", named(adapter, base, "chunked_loss")), workload_of("llama-tied")), base)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("base", ["", "int8", "nf4:layout=standard", "nf4:layout=packed"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_nor_in_16_bits_under_adapters_in_32(adapter, base, autocast):
    """Where types are mixed a cast would be a copy too."""
    model = changed("llama", named(adapter, base, "recompute"), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert held(watched_step(model, workload_of("llama")), base)


class KeepsDecoded(nn.Module):
    """A quantized layer gone wrong: autograd records the product with the decoded weight, and so keeps it."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.dequantize(x.dtype), self.layer.bias)


class KeepsCast(nn.Module):
    """A dense layer gone wrong: its weight is cast for each product."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.double(), self.layer.weight.double()).to(x.dtype)


@pytest.mark.parametrize(("base", "wrong"), [("int8", KeepsDecoded), ("nf4", KeepsDecoded), ("", KeepsCast)])
def test_the_law_catches_a_layer_that_keeps_copies(base, wrong):
    """All that autograd saves without `recompute`; with it, what one block keeps while its gradients are taken."""
    kept = {}
    for recompute in ("", "recompute"):
        model = changed("llama", named(base), depth=2)
        for _, block in blocks_of(model):
            for path, module in list(block.named_modules()):
                if isinstance(module, (QuantizedLinear, nn.Linear)):
                    replace(block, path, wrong(module))
        model.requires_grad_(False)
        model.model.norm.requires_grad_(True)
        model.get_input_embeddings().register_forward_hook(lambda _module, _args, output: output.requires_grad_(True))
        kept[recompute] = watched_step(tightfit.apply(model, named(recompute)), workload_of("llama"))
    assert len(kept[""].saved) == 2 * 7 and kept[""].alive >= 2 * 7
    assert kept["recompute"].saved == [] and kept["recompute"].alive >= 7


@cache
def highest(adapter: str, base: str, depth: int) -> int:
    """Most bytes of activations and scratch that lived in one step, from the meter on real tensors."""
    model = changed("llama", named(adapter, base, "recompute", "chunked_loss"), depth=depth)
    with ExitStack() as hooks:
        footprint = measure(model, inputs_for(model, workload_of("llama"), ids), workload_of("llama"), hooks)
    return max(phase.get("activations", 0) + phase.get("workspace", 0) for phase in footprint.phases.values())


@pytest.mark.parametrize("base", FORMATS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_block_more_takes_no_more_than_on_a_dense_base(adapter, base):
    """In living bytes through the whole step: a deeper model holds no decoded block more."""
    (growth, dense) = (highest(adapter, kind, 4) - highest(adapter, kind, 2) for kind in (base, ""))
    assert growth <= dense


def test_the_bytes_tell_of_a_layer_that_keeps_copies(monkeypatch):
    """The same measure, on layers whose products autograd records."""
    grown = {}
    for wrong in (False, True):
        if wrong:
            monkeypatch.setattr(QuantizedLinear, "forward", lambda layer, x: nn.functional.linear(x, layer.dequantize(x.dtype), layer.bias))
        peaks = []
        for depth in (2, 4):
            model = changed("llama", named("lora", "int8"), depth=depth)
            with ExitStack() as hooks:
                footprint = measure(model, inputs_for(model, workload_of("llama"), ids), workload_of("llama"), hooks)
            peaks.append(max(phase.get("activations", 0) for phase in footprint.phases.values()))
        grown[wrong] = peaks[1] - peaks[0]
    assert grown[True] > grown[False]
