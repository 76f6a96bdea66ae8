"""Notes: the lines that name the kernels of a model's encoded layers."""

import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from tightfit.formats.experts import QuantizedExperts
from tightfit.formats.int8 import Int8Codec, Int8Linear
from tightfit.formats.nf4 import NF4Linear
from tightfit.formats.notes import kernel_notes


def test_layers_of_a_kind_share_a_line() -> None:
    dense = MixtralExperts(MixtralConfig(hidden_size=64, intermediate_size=64, num_local_experts=2)).to(torch.bfloat16)
    model = nn.ModuleList(
        [*(Int8Linear(64, 32, dtype=torch.bfloat16) for _ in range(2)), NF4Linear(64, 32), QuantizedExperts(dense, Int8Codec())]
    )
    model.to_empty(device="cpu")
    assert kernel_notes(model) == [
        "2 Int8Linear in Int8Codec() on cpu, bfloat16: `_weight_int8pack_mm` at one token, `sliced` at many",
        "1 NF4Linear in NF4Codec(layout='standard', double_quantization=True) on cpu, float32: `sliced` at one token, `sliced` at many",
        "1 QuantizedExperts in Int8Codec() on cpu, bfloat16: `_weight_int8pack_mm` at one token, `sliced` at many",
    ]
    assert kernel_notes(nn.Linear(2, 2)) == []
