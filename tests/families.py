"""Tiny real Hugging Face models of many families, with random weights: what the laws are walked over."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

_TEXT = {"vocab_size": 384, "max_position_embeddings": 256}
_LLAMA = {**_TEXT, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}

CONFIGS: dict[str, tuple[str, str, dict[str, object]]] = {
    "llama": ("LlamaForCausalLM", "llama", {**_LLAMA, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaForCausalLM", "llama", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", {**_LLAMA, "head_dim": 16}),
    "gpt-neox": (
        "GPTNeoXForCausalLM",
        "gpt_neox",
        {**_TEXT, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    ),
    "opt": (
        "OPTForCausalLM",
        "opt",
        {**_TEXT, "hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "word_embed_proj_dim": 64},
    ),
    "bloom": ("BloomForCausalLM", "bloom", {"vocab_size": 384, "hidden_size": 64, "n_layer": 4, "n_head": 4}),
    "gpt2": ("GPT2LMHeadModel", "gpt2", {"vocab_size": 384, "n_positions": 256, "n_embd": 64, "n_layer": 4, "n_head": 4}),
    "gptj": ("GPTJForCausalLM", "gptj", {"vocab_size": 384, "n_positions": 256, "n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 8}),
    "t5": (
        "T5ForConditionalGeneration",
        "t5",
        {
            "vocab_size": 384,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 160,
            "num_layers": 4,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
        },
    ),
    "bert": (
        "BertForMaskedLM",
        "bert",
        {**_TEXT, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    ),
    "vit": (
        "ViTForImageClassification",
        "vit",
        {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 64, "patch_size": 8},
    ),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {**_LLAMA, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
    ),
    "mixtral": ("MixtralForCausalLM", "mixtral", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
GENERATES = [
    name
    for name, (cls, *_) in CONFIGS.items()
    if cls
    in {*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()}
]


def make(family: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A model of `family` with random weights, the same at every call, in evaluation mode and without dropout.

    In float32, where references are sharp; mixtures of experts in bfloat16, the only precision that torch's fake `_grouped_mm` knows.
    """
    import transformers

    cls, model_type, values = CONFIGS[family]
    config = AutoConfig.for_model(model_type, **values)
    for name in ("dropout", "attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate"):
        if name in config.to_dict():
            setattr(config, name, 0.0)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if name in config.to_dict():
            setattr(config, name, 0.0)
    config.architectures = [cls]
    torch.manual_seed(0)
    dtype = dtype or (torch.bfloat16 if "experts_per_tok" in str(values) else torch.float32)
    return getattr(transformers, cls)._from_config(config, dtype=dtype).eval()


def ids(shape: tuple[int, ...], high: int) -> torch.Tensor:
    """Random whole numbers below `high`, the same at every call."""
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1))


Maker = Callable[[], nn.Module]
