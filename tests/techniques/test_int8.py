"""int8: tiny real models of several families, transformed on meta and in place, run forward and backward."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NllbMoeConfig,
    NllbMoeModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tightfit.contracts import Absorbs, Transform
from tightfit.describe.blocks import blocks_of
from tightfit.formats.experts import QuantizedExperts
from tightfit.formats.linear import QuantizedLinear
from tightfit.techniques.int8 import Int8
from tightfit.techniques.nf4 import NF4
from tightfit.terms.errors import TightfitError

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = SIZES | IDS | {"num_key_value_heads": 2}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, **IDS)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES | IDS, ffn_dim=128, word_embed_proj_dim=64)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0)
    ),
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**SIZES | IDS)),
    "nllb_moe": lambda: NllbMoeModel(
        NllbMoeConfig(
            d_model=64, encoder_ffn_dim=128, decoder_ffn_dim=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, num_experts=4, vocab_size=99, encoder_sparse_step=2, decoder_sparse_step=2,
        )
    ),
}  # fmt: skip
TECHNIQUES = [Int8(), NF4(layout="standard"), NF4(layout="packed")]
LEFT = {
    "bert": {"pooler.dense"},
    "nllb_moe": {"encoder.layers.1.ffn.router.classifier", "decoder.layers.1.ffn.router.classifier"},
}
"""Linear layers that stay dense: heads, poolers and routers."""


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[family]().eval()


def output_of(model: PreTrainedModel, tokens: int = 6) -> torch.Tensor:
    torch.manual_seed(1)
    ids = torch.randint(3, 99, (2, tokens))
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **decoder)[0]


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
def test_real_models_run_near_the_dense_ones(family, technique) -> None:
    dense, model = model_of(family), model_of(family)
    assert isinstance(technique, Transform)
    paths = dict(model.named_parameters())
    technique.apply(model)
    assert paths.keys() <= dict(model.named_parameters()).keys()
    expected, output = output_of(dense), output_of(model)
    error = (output - expected).norm() / (expected - expected.mean(dim=-1, keepdim=True)).norm()
    assert 0 < error < (0.03 if isinstance(technique, Int8) else 0.35)
    left = {path for path, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D", "FalconLinear")}
    assert left == LEFT.get(family, {"lm_head"})
    blocks, dense_blocks = [[block for _, block in blocks_of(one)] for one in (model, dense)]
    assert sum(map(bytes_of, blocks)) < sum(map(bytes_of, dense_blocks)) * (0.35 if isinstance(technique, Int8) else 0.3)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
def test_meta_then_absorb_is_the_same_as_in_place(family, technique) -> None:
    dense, in_place = model_of(family), model_of(family)
    technique.apply(in_place)
    with torch.device("meta"):
        model = MODELS[family]().eval()
        technique.apply(model)
    assert bytes_of(model) == bytes_of(in_place)
    absorbing = {path: module for path, module in model.named_modules() if isinstance(module, Absorbs)}
    for path, parameter in dense.named_parameters():
        owner, _, name = path.rpartition(".")
        if owner in absorbing:
            absorbing[owner].absorb(name, parameter.detach())
    for path, module in absorbing.items():
        for name, tensor in in_place.get_submodule(path).state_dict().items():
            assert torch.equal(module.state_dict()[name], tensor)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mixtral", "gpt2", "t5"])
@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
def test_gradients_reach_the_embedding(family, technique) -> None:
    dense, model = model_of(family), model_of(family)
    technique.apply(model)
    for one in (dense, model):
        output_of(one).float().logsumexp(dim=-1).sum().backward()
    expected, gradient = (one.get_input_embeddings().weight.grad for one in (dense, model))
    assert torch.isfinite(gradient).all()
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.8
    for module in model.modules():
        if isinstance(module, (QuantizedLinear, QuantizedExperts)):
            assert all(parameter.grad is None for name, parameter in module.named_parameters() if not name.endswith("bias"))


@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
def test_generating_in_bfloat16(technique) -> None:
    model = model_of("mixtral").to(torch.bfloat16)
    technique.apply(model)
    with torch.inference_mode():
        tokens = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 7)


@pytest.mark.parametrize("technique", TECHNIQUES, ids=str)
def test_where_chooses(technique) -> None:
    model = model_of("mixtral")
    type(technique)(where=r"layers\.1\.(self_attn\.[qk]_proj|mlp)").apply(model)
    swapped = [path for path, module in model.named_modules() if isinstance(module, (QuantizedLinear, QuantizedExperts))]
    assert swapped == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.experts"]


@pytest.mark.parametrize("technique", [Int8, NF4])
def test_nothing_to_quantize_is_an_error(technique) -> None:
    name = technique.__name__.lower()
    with pytest.raises(TightfitError, match=f"^`{name}` found no linear layer or fused experts for `where=layers.9`$"):
        technique(where="layers.9").apply(model_of("llama"))
    model = model_of("llama")
    technique().apply(model)
    with pytest.raises(TightfitError, match="found no linear layer"):
        technique().apply(model)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_really_shrink(family) -> None:
    """bitsandbytes leaves transformers' fused experts dense without a word."""
    dense, model = model_of(family), model_of(family)
    Int8().apply(model)
    experts = [path for path, module in model.named_modules() if isinstance(module, QuantizedExperts)]
    assert len(experts) == 2
    for path in experts:
        assert bytes_of(model.get_submodule(path)) < bytes_of(dense.get_submodule(path)) / 3.8
