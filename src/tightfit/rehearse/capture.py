"""Capture: run one step of any module on fake tensors and write down every operation, forward and backward: nothing is allocated.

What is recorded is what the dispatcher sees below autograd, so what eager torch runs, not what an exporter makes of it: no guard or
graph break can stop it, operations in place stay so, and backward operations carry the place of their forward ones.
"""

import re
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Container, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten

from tightfit.describe.blocks import blocks_of
from tightfit.describe.graph import Captured, graph_of
from tightfit.describe.skeleton import meta_copy
from tightfit.describe.tape import Call, Storage, Tape, Visit, Window
from tightfit.rehearse.costs import priced
from tightfit.rehearse.fake import convertible_modules, materialize, one_sequence_per_row
from tightfit.rehearse.stand_in import standing_in
from tightfit.rehearse.work import scratch_of, work_of
from tightfit.steps import without_cache
from tightfit.terms.errors import TightfitError
from tightfit.terms.machine import Machine

Loss = Callable[[Any], Tensor]
"""From what the module gives to the number that is made small."""

_GROUPED = torch.ops.aten._grouped_mm.default
_LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)


def capture(
    module: nn.Module,
    inputs: Any,
    training: bool = False,
    grain: str = "operator",
    whole: Container[str] = (),
    loss: Loss | None = None,
    state_bytes: int = 8,
    gradients_stay: bool = True,
    tied: bool = True,
    device: str = "cpu",
    machine: Machine | None = None,
) -> Captured:
    """The graph of one step of `module`, for which no weight is loaded: it may lie on `meta`, and is not changed.

    `inputs`: a tensor, a tuple of arguments, or a mapping of keyword arguments; only shapes and dtypes are read. A Hugging Face model
    is run without a cache unless they say otherwise. `grain`, `whole`, `gradients_stay` and `tied`: see `graph_of`.
    `training`: forward, loss and backward, with the module in training mode; the optimizer's own step is left out, its state is not:
    `state_bytes` for each trained element (AdamW: 8). `loss`: by default the output's own, else the mean square of its first tensor.
    `device`: `cpu`, or a GPU that is here, whose kernels are the calls. Seconds are those of `machine` (`Machine.here()`) for its tier.
    Mixtures of experts: with transformers' default `experts_implementation` all experts of a layer are one grouped product, which is one
    operator for any routing. Those that loop over the experts hit by data have no graph; a few have a stand-in (`stand_in.py`).
    Raises `TightfitError` for a module that decides shapes from its data or computes nothing.
    """
    tape = record(module, inputs, training, loss, device)
    captured = graph_of(tape, grain, whole, state_bytes, gradients_stay, tied)
    return replace(captured, graph=priced(captured, machine or Machine.here(), "gpu" if device.startswith("cuda") else "ram"))


def record(module: nn.Module, inputs: Any, training: bool = False, loss: Loss | None = None, device: str = "cpu") -> Tape:
    """One step of `module`, call by call. Arguments as for `capture`."""
    _refuse_device(device)
    copy = meta_copy(module).train(training)
    recorder = _Recorder()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with ExitStack() as stack:
        stack.enter_context(standing_in(copy))
        stack.enter_context(mode)
        stack.enter_context(convertible_modules())
        if "transformers" in sys.modules:
            stack.enter_context(one_sequence_per_row())
        stack.enter_context(torch.set_grad_enabled(training))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        tensors = _faked(copy, mode, torch.device(device), recorder)
        args, kwargs = arguments_of(copy, _fake_inputs(inputs, mode, torch.device(device), recorder))
        _watch_modules(copy, recorder)
        stack.enter_context(recorder)
        output = copy(*args, **kwargs)
        result = _scalar(output, loss) if training else output
        if training:
            del output
            recorder.backward(_trained(result, module))
    gradients = {name: recorder.window(tensor.grad) for name, tensor in tensors.items() if tensor.grad is not None}
    results = tuple(recorder.window(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
    if not recorder.calls:
        raise TightfitError(f"`{type(module).__name__}` computes nothing from its inputs")
    made = (tuple(recorder.calls), tuple(recorder.storages), tuple(recorder.visits))
    return Tape(type(module).__name__, *made, results, gradients, recorder.constants, dict(recorder.freed))


def arguments_of(module: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from what `capture` takes as `inputs`."""
    if isinstance(inputs, Mapping):
        return (), {**without_cache(module), **inputs}
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), without_cache(module)


def _refuse_device(device: str) -> None:
    """Fake tensors of a device that torch cannot reach end the whole process."""
    if device.partition(":")[0] != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise TightfitError(f"no device `{device}` is here to capture for", hint="capture for `cpu`: the graph is much the same")


def _scalar(output: Any, loss: Loss | None) -> Tensor:
    if loss is not None:
        return loss(output)
    if isinstance(output, Mapping) and output.get("loss") is not None:
        return output["loss"]
    first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)
    if first is None:
        raise TightfitError("the module gives nothing that a loss could be taken of", hint="pass `loss`, a function of its output")
    return first if first.numel() == 1 else first.float().square().mean()


def _trained(loss: Tensor, module: nn.Module) -> Tensor:
    if not loss.requires_grad:
        raise TightfitError(f"the loss of `{type(module).__name__}` depends on nothing that is trained")
    return loss


def _faked(module: nn.Module, mode: FakeTensorMode, device: torch.device, recorder: "_Recorder") -> dict[str, Tensor]:
    """Make the module's parameters and buffers fake ones on `device`, and name them; tied ones once."""
    materialize(module, lambda tensor: FakeTensor(mode, torch.empty_like(tensor, device="meta"), device))
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in module.named_parameters(remove_duplicate=False):
        names[id(tensor)].append(name)
    for name, tensor in parameters.items():
        sizes = (tensor.nbytes, tensor.numel()) if tensor.requires_grad else (0, 0)
        recorder.adopt(tensor, "parameter", name, *sizes, tuple(other for other in names[id(tensor)] if other != name))
    for name, tensor in buffers.items():
        recorder.adopt(tensor, "buffer", name)
    return parameters | buffers


def _fake_inputs(inputs: Any, mode: FakeTensorMode, device: torch.device, recorder: "_Recorder") -> Any:
    leaves, spec = tree_flatten_with_path(inputs)
    made = []
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            leaf = FakeTensor(mode, torch.empty_like(leaf, device="meta", requires_grad=False), device)
            recorder.adopt(leaf, "input", ".".join(re.findall(r"\w+", keystr(path))) or "0")
        made.append(leaf)
    return tree_unflatten(made, spec)


def _watch_modules(module: nn.Module, recorder: "_Recorder") -> None:
    blocks = {id(block) for _, block in blocks_of(module)}
    for path, part in module.named_modules():
        leaf, block = next(part.children(), None) is None, id(part) in blocks
        kind = type(part).__name__

        def before(_module: Any, _args: Any, path: str = path, kind: str = kind, leaf: bool = leaf, block: bool = block) -> None:
            recorder.enter(path, kind, leaf, block)

        part.register_forward_pre_hook(before, prepend=True)
        part.register_forward_hook(lambda _module, _args, _output: recorder.leave(), always_call=True)


class _Recorder(TorchDispatchMode):
    """A dispatch mode that writes every operation down, with the storages it reads, changes and makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.storages: list[Storage] = []
        self.visits: list[Visit] = []
        self.constants: dict[int, Tensor] = {}
        self.freed: dict[int, int] = {}
        self._known: dict[int, int] = {}
        self._inside: list[int] = []
        self._makers: dict[int, int] = {}
        self._forward: dict[int, tuple[int | None, int | None]] = {}  # by autograd's number of a node: the call and the visit it is of
        self._owner: tuple[int | None, int | None] = (None, None)
        self._backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # a question that fake tensors ask, often
            return func(*args, **kwargs)
        leaves, shape = tree_flatten((args, kwargs))
        leaves = [self.window(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        result = _fake_grouped(func, args, kwargs) if func is _GROUPED else func(*args, **kwargs)
        if func in _LIFTS and not isinstance(args[0], FakeTensor):
            self.adopt(result, "constant")
            self.constants[self.window(result).storage] = args[0]
            return result
        before = len(self.storages)
        results = tuple(self.window(leaf, "made") if isinstance(leaf, Tensor) else None for leaf in tree_leaves(result))
        makes = tuple(range(before, len(self.storages)))
        reads = tuple(dict.fromkeys(leaf.storage for leaf in leaves if isinstance(leaf, Window)))
        given = tree_unflatten(leaves, shape)
        writes = _written(func, *given)
        if makes or writes:
            flops, touched = work_of(func, args, kwargs, result)
            scratch = scratch_of(func, args, kwargs, result)
            forward, visit = self._place()
            self._makers.update(dict.fromkeys((*makes, *writes), len(self.calls)))
            self.calls.append(Call(func, *given, results, reads, writes, makes, visit, self._backward, forward, flops, touched, scratch))
        if not self._backward:
            self._remember(len(self.calls) - 1 if makes or writes else next((self._makers[at] for at in reads if at in self._makers), None))
        return result

    def window(self, tensor: Tensor, kind: str = "constant") -> Window:
        """Where `tensor` lies; a storage that was never seen is of `kind`."""
        key = tensor.untyped_storage()._cdata
        if key not in self._known:
            self.adopt(tensor, kind)
            if kind == "constant":
                self.constants[self._known[key]] = tensor
        return Window(self._known[key], tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())

    def adopt(
        self, tensor: Tensor, kind: str, name: str = "", gradient_bytes: int = 0, elements: int = 0, aliases: tuple[str, ...] = ()
    ) -> None:
        """Give the storage of `tensor` a number. It is told by its address for as long as it lives."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._known[key] = len(self.storages)
        self.storages.append(Storage(kind, storage.nbytes(), name, gradient_bytes, elements, aliases))
        weakref.finalize(storage, self._forget, key).atexit = False

    def enter(self, path: str, kind: str, leaf: bool, block: bool) -> None:
        """From now on, operations belong to a visit of this module."""
        self.visits.append(Visit(path, kind, leaf, block, self._inside[-1] if self._inside else None))
        self._inside.append(len(self.visits) - 1)

    def leave(self) -> None:
        """The visit entered last is over."""
        self._inside.pop()

    def backward(self, loss: Tensor) -> None:
        """From now on, operations belong to the forward ones whose gradients they compute."""
        self._backward = True
        loss.backward()

    def _forget(self, key: int) -> None:
        self.freed[self._known.pop(key)] = len(self.calls)

    def _remember(self, call: int | None) -> None:
        """Autograd numbered its node, if it made one, just before it called the operation."""
        visit = self._inside[-1] if self._inside else None
        self._forward.setdefault(torch.autograd._get_sequence_nr() - 1, (call, visit))

    def _place(self) -> tuple[int | None, int | None]:
        """Of which forward call, in which visit. Sums of gradients and their accumulation belong to the node that ran last."""
        if not self._backward:
            return None, self._inside[-1] if self._inside else None
        node = torch._C._current_autograd_node()
        if node is not None and node._sequence_nr() in self._forward:
            self._owner = self._forward[node._sequence_nr()]
        return (None, self._inside[-1]) if self._inside else self._owner  # inside a module: a forward operation that runs again


def _fake_grouped(func: Any, args: Any, kwargs: Any) -> Tensor:
    """A grouped product. Its fake kernel knows bfloat16 alone (torch 2.13); the real one, on the CPU, float32 too."""
    first, second, *rest = args
    return func(first.to(torch.bfloat16), second.to(torch.bfloat16), *rest, **kwargs).to(first.dtype)


def _written(func: Any, args: Any, kwargs: Any) -> tuple[int, ...]:
    """The storages that `func` changes, by its schema."""
    if not func._schema.is_mutable:
        return ()
    changed = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.name in kwargs or place >= len(args) else args[place]
            changed += [leaf.storage for leaf in tree_leaves(value) if isinstance(leaf, Window)]
    return tuple(dict.fromkeys(changed))
