"""Seconds of operators: by a machine's rates as worked out by hand, and measured with a clock that counts."""

from copy import deepcopy
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tightfit.describe.graph import graph_of
from tightfit.rehearse import costs
from tightfit.rehearse.capture import capture
from tightfit.rehearse.costs import priced, profile, profile_calls
from tightfit.rehearse.work import scratch_of, work_of
from tightfit.terms.errors import TightfitError
from tightfit.terms.machine import Machine

MACHINE = Machine(flops=1e6, memory_bandwidth=1e5, gpu_flops=1e9, gpu_bandwidth=1e4, operation_seconds=0.5)


class Small(nn.Module):
    """A product, batch normalization that changes its buffers, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.product, self.norm = nn.Linear(8, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.product(x)).sum(1)


def test_an_operator_takes_what_its_products_or_its_bytes_take() -> None:
    """16 rows × 8 by 8 × 4: 1,024 operations; 4 bytes for each of 16·8 + 8·4 + 4 + 16·4 elements; then 16·4 in and 16 out."""
    captured = capture(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), torch.rand(16, 8), machine=MACHINE)
    given, product, relu = captured.graph.operators
    assert given.seconds == 0
    assert product.seconds == pytest.approx(max(1024 / 1e6, 912 / 1e5) + 0.5)
    assert relu.seconds == pytest.approx(512 / 1e5 + 0.5)
    faster = priced(captured, MACHINE, "gpu").operators
    assert faster[1].seconds == pytest.approx(max(1024 / 1e9, 912 / 1e4) + 0.5)
    slow = priced(captured, Machine(flops=1e3, memory_bandwidth=1e9, operation_seconds=0.25), "ram").operators
    assert slow[1].seconds == pytest.approx(1024 / 1e3 + 0.25)


def test_grains_take_equally_long() -> None:
    tape = capture(Small(), torch.rand(16, 8), training=True, machine=MACHINE).tape
    fine, coarse = graph_of(tape), graph_of(tape, "module")
    assert len(coarse.parts) < len(fine.parts)
    assert priced(coarse, MACHINE, "ram").seconds == pytest.approx(priced(fine, MACHINE, "ram").seconds)


def test_an_embedding_reads_only_its_rows() -> None:
    table, ids = torch.rand(1000, 8), torch.zeros(5, dtype=torch.long)
    function = torch.ops.aten.embedding.default
    assert work_of(function, (table, ids), {}, function(table, ids)) == (0.0, 5 * 8 + 2 * 5 * 8 * 4)


def test_what_is_expanded_is_read_once() -> None:
    row, function = torch.rand(8).expand(100, 8), torch.ops.aten.neg.default
    assert work_of(function, (row,), {}, function(row)) == (0.0, 8 * 4 + 100 * 8 * 4)


def test_only_larger_kernels_of_convolutions_need_scratch() -> None:
    function, x = torch.ops.aten.convolution.default, torch.rand(1, 32, 8, 8)
    for size, wanted in ((1, False), (3, True)):
        args: tuple[Any, ...] = (x, torch.rand(16, 32, size, size), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        assert (scratch_of(function, args, {}, function(*args)) > 0) == wanted


def test_measured_seconds_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves on by one at each look: each call lasts one, so an operator lasts as long as it has calls."""
    module, x = Small().eval(), torch.rand(16, 8)
    captured = graph_of(capture(module, x).tape, "module")
    ticks = count()
    monkeypatch.setattr(costs.time, "perf_counter", lambda: float(next(ticks)))
    assert [operator.seconds for operator in profile(captured, module, x).operators] == [len(calls) for calls in captured.parts]


def test_the_middle_of_the_runs_counts_and_the_first_run_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = nn.ReLU(), torch.rand(4)
    captured = capture(module, x)
    moments = iter([0.0, 100.0, 0.0, 7.0, 0.0, 1.0, 0.0, 3.0])
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(moments))
    assert profile_calls(captured, module, x, repeats=3) == [3.0]


@pytest.mark.parametrize("training", [False, True])
def test_a_profile_leaves_the_module_and_its_inputs_as_they_were(training: bool) -> None:
    module, x = Small(), torch.rand(16, 8)
    captured = capture(module, x, training=training)
    before, given = deepcopy(module.state_dict()), x.clone()
    graph = profile(captured, module, x, repeats=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert torch.equal(x, given)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all((operator.seconds > 0) == bool(calls) for operator, calls in zip(graph.operators, captured.parts, strict=True))


def test_a_large_product_takes_longest() -> None:
    module, x = nn.Sequential(nn.ReLU(), nn.Linear(512, 512), nn.ReLU()), torch.rand(512, 512)
    graph = profile(capture(module, x), module, x, repeats=3)
    assert max(graph.operators, key=lambda operator: operator.seconds).name == "1: addmm"


def test_what_cannot_be_measured_is_told() -> None:
    with torch.device("meta"):
        module = nn.Linear(4, 4)
    captured = capture(module, torch.rand(2, 4))
    with pytest.raises(TightfitError, match="`weight` has no contents"):
        profile(captured, module, torch.rand(2, 4))
    with pytest.raises(TightfitError, match="0 repeats measure nothing"):
        profile(captured, nn.Linear(4, 4), torch.rand(2, 4), repeats=0)
