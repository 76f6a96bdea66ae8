"""Notes: the lines that name the kernels of a model's encoded layers."""

import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from tightfit.formats.experts import QuantizedExperts
from tightfit.formats.int8 import Int8Codec
from tightfit.formats.linear import QuantizedLinear
from tightfit.formats.nf4 import NF4Codec
from tightfit.formats.notes import kernel_notes


def test_layers_of_a_kind_share_a_line() -> None:
    dense = MixtralExperts(MixtralConfig(hidden_size=64, intermediate_size=64, num_local_experts=2)).to(torch.bfloat16)
    alike = [QuantizedLinear(64, 32, Int8Codec(), dtype=torch.bfloat16) for _ in range(2)]
    model = nn.ModuleList([*alike, QuantizedLinear(64, 32, NF4Codec()), QuantizedExperts(dense, Int8Codec())])
    model.to_empty(device="cpu")
    nf4 = "NF4Codec(layout='standard', double_quantization=True)"
    assert kernel_notes(model) == [
        "1 QuantizedExperts in Int8Codec() on cpu, bfloat16: `_weight_int8pack_mm` at one token, `sliced` at many",
        "2 QuantizedLinear in Int8Codec() on cpu, bfloat16: `_weight_int8pack_mm` at one token, `sliced` at many",
        f"1 QuantizedLinear in {nf4} on cpu, float32: `sliced` at one token, `sliced` at many",
    ]
    assert kernel_notes(nn.Linear(2, 2)) == []
