"""A replay gives what the module and autograd give, in the memory that the graph promises."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from captures import EXAMPLES, TRAINED, example, loss_of, recorded, tensors_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tightfit.describe.graph import graph_of
from tightfit.describe.tape import Tape
from tightfit.planner.placement.simulate import simulate
from tightfit.rehearse.allocator import allocator_peak
from tightfit.rehearse.capture import capture
from tightfit.rehearse.replay import bound, replay
from tightfit.terms.cluster import Cluster, Device, Link
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placement


def _working_peak(graph: Graph) -> int:
    """What one device holds at most beside weights and inputs, with the operators in the order of the step."""
    bare = [
        replace(one, seconds=1.0, weight_bytes=0, output_bytes=0 if one.name.startswith("input: ") else one.output_bytes)
        for one in graph.operators
    ]
    everything = tuple(range(len(bare)))
    cluster = Cluster((Device("one", 1 << 60),), Link(1e9))
    return simulate(replace(graph, operators=tuple(bare)), cluster, Placement((0,) * len(bare), everything, "recorded")).peak_bytes[0]


def _replayed_peak(tape: Tape, module: nn.Module, inputs: Any) -> int:
    tensors = bound(tape, module, inputs)
    return allocator_peak(lambda: replay(tape, tensors))


def _real_peak(module: nn.Module, inputs: dict[str, Tensor]) -> int:
    def step() -> Any:
        with torch.no_grad():
            return module(**inputs)

    step()
    return allocator_peak(step)


@pytest.mark.parametrize("name", EXAMPLES)
def test_replayed_results_are_the_modules(name: str) -> None:
    module, inputs = example(name)
    tape = recorded(name)
    with torch.no_grad():
        wanted = tensors_of(module(**inputs))
    got = replay(tape, bound(tape, module, inputs)).results
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", TRAINED)
def test_replayed_gradients_are_autograds(name: str) -> None:
    module, inputs = example(name)
    tape = recorded(name, True)
    tensors = bound(tape, module, inputs)
    torch.manual_seed(3)
    replayed = replay(tape, tensors)
    torch.manual_seed(3)
    module = deepcopy(module).train()  # a step changes the buffers
    loss = loss_of(module(**inputs))
    loss.backward()
    assert torch.equal(replayed.results[0], loss)
    wanted = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert set(replayed.gradients) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(replayed.gradients[name], gradient)


class Recomputing(nn.Module):
    """A forward pass that runs again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.GELU()), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(checkpoint(self.inner, x, use_reentrant=False))


def test_what_is_computed_again_is_recorded_again() -> None:
    module, x = Recomputing(), torch.rand(3, 6)
    captured = capture(module, x, training=True, loss=loss_of)
    names = [operator.name for operator in captured.graph.operators]
    assert {"inner.0: addmm", "inner.2: gelu", "inner.0: addmm backward", "inner.2: gelu_backward"} <= set(names)
    homes = {operator.group for operator in captured.graph.operators if operator.name.startswith("inner.0: ")}
    assert homes == {"inner.0: addmm"}


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "vit", "convolutions"])
def test_one_device_peaks_as_the_allocator_does(name: str) -> None:
    """Operator by operator as the replay does, which gives up a tensor after its last reader; block by block as Python does."""
    module, inputs = example(name)
    tape = recorded(name)
    assert _working_peak(graph_of(tape).graph) == pytest.approx(_replayed_peak(tape, module, inputs), rel=0.01)
    assert _working_peak(graph_of(tape, "block").graph) == pytest.approx(_real_peak(module, inputs), rel=0.11)


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1)])
def test_scratch_of_convolutions_is_known(kernel: int, padding: int) -> None:
    module, inputs = nn.Conv2d(24, 48, kernel, padding=padding), torch.rand(2, 24, 20, 20)
    tape = capture(module, inputs).tape
    assert _working_peak(graph_of(tape).graph) == pytest.approx(_replayed_peak(tape, module, inputs), rel=0.05)
    trained = capture(module, inputs, training=True).tape
    peak = _replayed_peak(trained, module, inputs)
    assert peak <= _working_peak(graph_of(trained).graph) + sum(parameter.nbytes for parameter in module.parameters()) < 1.6 * peak


def test_scratch_of_recurrent_layers_is_known() -> None:
    module, inputs = nn.LSTM(48, 64, batch_first=True), torch.rand(8, 40, 48)
    tape = capture(module, inputs).tape
    assert 1 <= _working_peak(graph_of(tape).graph) / _replayed_peak(tape, module, inputs) < 1.25


@pytest.mark.parametrize("name", ["bert", "llama-tied", "convolutions"])
def test_a_training_step_peaks_as_the_allocator_does(name: str) -> None:
    module, inputs = example(name)
    tape = recorded(name, True)
    scratch = 0.1 if name == "convolutions" else 0.01  # that of convolutions is known less well backwards
    assert _working_peak(graph_of(tape, gradients_stay=False).graph) == pytest.approx(_replayed_peak(tape, module, inputs), rel=scratch)
