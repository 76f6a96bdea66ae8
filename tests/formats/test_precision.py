"""Precision: a module that rests in 32 bits computes as one in 16 does, and its gradients arrive in 32."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tightfit.formats.precision import in_given_precision


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.SiLU(), nn.LayerNorm(6))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_computes_as_a_module_of_that_precision(dtype, recompute):
    resting, whole, x = layers(), layers().to(dtype), torch.randn(4, 8).to(dtype)
    resting.forward = partial(in_given_precision, resting, resting.forward)
    before = dict(resting.named_parameters())
    y = checkpoint(resting, x, use_reentrant=False) if recompute else resting(x)
    expected = whole(x)
    assert y.dtype == dtype and torch.equal(y, expected)
    assert all(parameter is before[name] for name, parameter in resting.named_parameters())
    y.square().sum().backward()
    expected.square().sum().backward()
    for mine, other in zip(resting.parameters(), whole.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32 and torch.equal(mine.grad, other.grad.float())


def test_what_it_keeps_of_the_input_is_the_input():
    module, x, kept = nn.Linear(8, 6), torch.randn(4, 8).bfloat16(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        in_given_precision(module, module.forward, x)
    assert any(tensor.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for tensor in kept)
    assert all(tensor.dtype == torch.bfloat16 for tensor in kept)


def test_a_fault_leaves_the_parameters_as_they_were():
    module = nn.Linear(8, 6)
    before = dict(module.named_parameters())
    with pytest.raises(RuntimeError):
        in_given_precision(module, module.forward, torch.randn(4, 7).bfloat16())
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
