"""What is captured on fake tensors equals what a real run does: its weights, the storages it makes, its operations and their places."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from captures import EXAMPLES, TRAINED, example, loss_of, recorded, tensors_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tightfit.describe.graph import graph_of
from tightfit.rehearse.capture import capture
from tightfit.rehearse.fake import one_sequence_per_row
from tightfit.rehearse.replay import bound, replay
from tightfit.terms.errors import TightfitError
from tightfit.terms.graph import Operator


class Watched(TorchDispatchMode):
    """The bytes of each storage that a real run makes, in order: the witness for the bytes of outputs."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.held = list(known)  # kept, so that no address comes twice
        self.seen = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.seen and leaf.untyped_storage().nbytes():
                self.seen.add(leaf.untyped_storage().data_ptr())
                self.held.append(leaf)
                self.sizes.append(leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", EXAMPLES)
def test_weights_count_once(name: str) -> None:
    module, _ = example(name)
    weights = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    for grain in ("operator", "module", "block"):
        assert graph_of(recorded(name), grain).graph.weight_bytes == weights


@pytest.mark.parametrize("name", EXAMPLES)
def test_outputs_are_as_large_as_those_of_a_real_run(name: str) -> None:
    module, inputs = example(name)
    tape = recorded(name)
    with torch.no_grad(), one_sequence_per_row(), Watched([*module.parameters(), *module.buffers(), *tensors_of(inputs)]) as watched:
        module(**inputs)
    made = [storage.size_bytes for storage in tape.storages if storage.kind in ("made", "constant") and storage.size_bytes]
    assert made == watched.sizes


@pytest.mark.parametrize("name", [name for name in EXAMPLES if "mixtral" not in name])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    module, inputs = example(name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**inputs)
    assert sum(call.flops for call in recorded(name).calls) == counter.get_total_flops()


def test_grouped_products_count_too() -> None:
    module, inputs = example("mixtral")
    config = module.config
    calls = [call for call in recorded("mixtral").calls if "grouped_mm" in str(call.function)]
    rows = inputs["input_ids"].numel() * config.num_experts_per_tok
    assert len(calls) == 2 * config.num_hidden_layers
    assert sum(call.flops for call in calls) == config.num_hidden_layers * 6 * rows * config.hidden_size * config.intermediate_size


def test_training_counts_gradients_and_the_optimizers_state() -> None:
    module, inputs = example("bert")
    weights = sum(parameter.nbytes for parameter in module.parameters())
    buffers = sum(buffer.nbytes for buffer in module.buffers())
    assert capture(module, inputs, training=True, loss=loss_of).graph.weight_bytes == 4 * weights + buffers
    assert capture(module, inputs, training=True, loss=loss_of, state_bytes=0).graph.weight_bytes == 2 * weights + buffers
    assert capture(module, inputs, training=True, loss=loss_of, gradients_stay=False).graph.weight_bytes == 3 * weights + buffers
    frozen = deepcopy(module)
    for parameter in frozen.bert.encoder.parameters():
        parameter.requires_grad_(False)
    trained = sum(parameter.nbytes for parameter in frozen.parameters() if parameter.requires_grad)
    assert capture(frozen, inputs, training=True, loss=loss_of).graph.weight_bytes == weights + 3 * trained + buffers


@pytest.mark.parametrize("name", TRAINED)
def test_each_backward_operator_stands_with_its_forward_one(name: str) -> None:
    """By place: what a layer's weight and its gradient's product are called, and that they share a group."""
    graph = graph_of(recorded(name, True)).graph
    backward = [operator for operator in graph.operators if operator.backward]
    assert {_place(one) for one in backward} <= {_place(one) for one in graph.operators if not one.backward} | {""}  # views of the whole
    products = [one for one in backward if ": mm" in one.name or "convolution_backward" in one.name]
    homes = {one.group: _place(one) for one in graph.operators if one.weight_bytes}
    assert products
    for one in products:
        if homes.get(one.group) not in ("model.embed_tokens", "transformer.wte", "encoder.embed_tokens"):  # the head's weight lies there
            assert homes.get(one.group, _place(one)) == _place(one)


def _place(operator: Operator) -> str:
    return operator.name.rpartition(":")[0]


def test_names_say_where_in_the_model_an_operator_stands() -> None:
    names = [operator.name for operator in graph_of(recorded("bert")).graph.operators]
    assert "input: input_ids" in names
    assert "bert.encoder.layer.3.attention.self.query: addmm" in names
    assert len(set(names)) == len(names)
    blocks = [operator.name for operator in graph_of(recorded("bert"), "block").graph.operators]
    assert [name for name in blocks if "layer" in name] == [f"bert.encoder.layer.{layer}" for layer in range(4)]


def test_one_group_holds_a_tied_embedding_and_its_head() -> None:
    graph = graph_of(recorded("llama-tied")).graph
    groups = {operator.name.partition(":")[0]: operator.group for operator in graph.operators if operator.group}
    assert groups["model.embed_tokens"] == groups["lm_head"] != ""


@pytest.mark.parametrize("give", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}])
def test_inputs_come_in_any_form(give: Callable[[Tensor], Any]) -> None:
    captured = capture(nn.Linear(4, 3), give(torch.rand(2, 4)))
    assert [operator.output_bytes for operator in captured.graph.operators] == [32, 24]
    assert captured.graph.weight_bytes == 60


class Odd(nn.Module):
    """Constants made on the way and held aside, and a weight that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.unread = nn.Parameter(torch.rand(7))
        self.aside = torch.arange(3.0)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([1.0, 2.0, 3.0]) + self.aside


def test_constants_are_kept() -> None:
    module, x = Odd(), torch.rand(3)
    captured = capture(module, x)
    assert torch.equal(replay(captured.tape, bound(captured.tape, module, x)).results[0], module(x))
    assert [operator.name for operator in captured.graph.operators] == ["input: 0", "mul", "add"]
    assert captured.graph.weight_bytes == 28


def test_the_module_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = deepcopy(module.state_dict())
    capture(module.eval(), torch.rand(2, 4), training=True)
    assert not module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not module[0]._forward_pre_hooks


class Choosing(nn.Module):
    """How many rows come out depends on what is in them."""

    def forward(self, x: Tensor) -> Tensor:
        return x[x.sum(1) > 0]


def test_shapes_that_depend_on_data_are_told() -> None:
    with pytest.raises(TightfitError, match="`Choosing` decides shapes from its data"):
        capture(Choosing(), torch.rand(2, 4))


def test_nothing_to_compute_and_nothing_to_train_are_told() -> None:
    with pytest.raises(TightfitError, match="`Identity` computes nothing"):
        capture(nn.Identity(), torch.rand(2))
    with pytest.raises(TightfitError, match="loss could be taken") as caught:
        capture(nn.Flatten(), torch.zeros(2, 2, dtype=torch.long), training=True)
    assert "`loss`" in caught.value.hint
    with pytest.raises(TightfitError, match="the loss of `ReLU` depends on nothing that is trained"):
        capture(nn.ReLU(), torch.rand(2), training=True)


@pytest.mark.parametrize("device", ["cuda", "nowhere"])
def test_a_device_that_is_not_here_is_told(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TightfitError, match=f"no device `{device}` is here"):
        capture(nn.Linear(4, 4), torch.rand(2, 4), device=device)
