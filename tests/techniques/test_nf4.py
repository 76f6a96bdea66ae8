"""nf4: its settings, and what it does not import before it is asked to work. Models are run in `test_int8.py` beside it."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tightfit.formats.linear import QuantizedLinear
from tightfit.formats.nf4 import NF4Codec, has_packed_kernel
from tightfit.techniques.nf4 import NF4
from tightfit.terms.errors import TightfitError


def llama(width: int = 64) -> LlamaForCausalLM:
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=4, vocab_size=99)
        )


@pytest.mark.parametrize(
    ("technique", "layout", "bits"),
    [
        (NF4(layout="standard"), "standard", 4.127),
        (NF4(layout="standard", double_quantization=False), "standard", 4.5),
        (NF4(layout="packed"), "packed", 4.25),
    ],
)
def test_settings_decide_the_layout_and_the_bits(technique, layout, bits) -> None:
    model = llama(2048)
    technique.apply(model)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 7 and {layer.codec.layout for layer in layers} == {layout}
    stored = sum(tensor.nbytes for layer in layers for tensor in layer.stored)
    assert stored * 8 / sum(layer.in_features * layer.out_features for layer in layers) == pytest.approx(bits, abs=0.005)


@pytest.mark.parametrize(("kernel", "gpu", "expected"), [(True, False, "packed"), (True, True, "standard"), (False, False, "standard")])
def test_automatic_layout(kernel, gpu, expected, monkeypatch) -> None:
    monkeypatch.setattr("tightfit.formats.nf4.has_packed_kernel", lambda: kernel)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    model = llama()
    NF4().apply(model)
    assert {module.codec.layout for module in model.modules() if isinstance(module, QuantizedLinear)} == {expected}


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(TightfitError, match="`nf4` has no layout `packd`") as error:
        NF4(layout="packd").apply(llama())
    assert error.value.hint == "did you mean `packed`?"


def test_bitsandbytes_comes_only_when_it_is_needed() -> None:
    code = """
import sys
import tightfit.techniques.nf4, tightfit.formats.int8, tightfit.formats.experts, tightfit.formats.workspace
assert "bitsandbytes" not in sys.modules
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
with torch.device("meta"), FakeTensorMode():
    import tightfit.formats.linear, tightfit.formats.nf4
layer = tightfit.formats.linear.QuantizedLinear(64, 32, tightfit.formats.nf4.NF4Codec())
layer.absorb("weight", torch.eye(32, 64))
assert torch.equal(layer.dequantize(), torch.eye(32, 64))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "gemm_4bit_forward" not in done.stderr


def test_the_kernel_is_named_where_there_is_one() -> None:
    layer = QuantizedLinear(64, 32, NF4Codec("packed")).to_empty(device="cpu")
    assert layer.path == ("gemv_4bit" if has_packed_kernel() else "sliced", "sliced")
