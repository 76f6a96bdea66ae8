"""Narrow: configs of real models, whose narrow widths are worked out by hand, and narrow models that run."""

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BloomConfig,
    DebertaV2Config,
    DeepseekV3Config,
    FalconConfig,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Qwen3Config,
)

from tightfit.describe.narrow import narrow_model, narrowed
from tightfit.terms.errors import TightfitError

PYTHIA_160M = GPTNeoXConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
QWEN3_06B = Qwen3Config(hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
LLAMA_2_70B = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (LlamaConfig(), {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 32, "head_dim": 8}),
        (LLAMA_2_70B, {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 8}),
        (QWEN3_06B, {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 8}),
        (PYTHIA_160M, {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 6}),  # a quarter of 4 could not be turned
        (OPTConfig(word_embed_proj_dim=512), {"hidden_size": 48, "ffn_dim": 192, "word_embed_proj_dim": 48, "num_attention_heads": 12}),
        (BloomConfig(hidden_size=1024, n_head=16), {"hidden_size": 64, "num_attention_heads": 16}),
        (GPTJConfig(), {"hidden_size": 256, "num_attention_heads": 16, "rotary_dim": 4}),
        (FalconConfig(), {"hidden_size": 284, "num_attention_heads": 71}),
        (BertConfig(), {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 12}),
    ],
    ids=lambda value: value.model_type if not isinstance(value, dict) else "",
)
def test_widths_by_hand(config, wanted):
    before = config.to_dict()
    narrow = narrowed(config, 16)
    assert {name: getattr(narrow, name) for name in wanted} == wanted
    assert narrow.num_hidden_layers == config.num_hidden_layers
    assert config.to_dict() == before


def test_heads_become_fewer_in_whole_groups():
    config = LlamaConfig(hidden_size=96, intermediate_size=192, num_attention_heads=12, num_key_value_heads=4)
    assert [narrowed(config, 8).num_attention_heads, narrowed(config, 8).num_key_value_heads, narrowed(config, 8).head_dim] == [6, 2, 2]


def test_a_reduction_that_does_not_divide_is_refused_with_those_that_do():
    with pytest.raises(TightfitError, match="a width of 96 in 12 heads cannot be divided by 5") as fault:
        narrowed(LlamaConfig(hidden_size=96, num_attention_heads=12), 5)
    assert fault.value.hint == "reductions that work: 2, 4, 8, 16"
    with pytest.raises(TightfitError):
        narrowed(LlamaConfig(), 0)


@pytest.mark.parametrize("config", [MambaConfig(), DeepseekV3Config()], ids=["mamba", "deepseek"])
def test_attention_of_another_kind_is_refused(config):
    with pytest.raises(TightfitError, match="has no narrower form"):
        narrowed(config, 16)


@pytest.mark.parametrize("config", [LlamaConfig(), PYTHIA_160M, OPTConfig(), BloomConfig(hidden_size=64), BertConfig(), GPTJConfig()])
def test_a_narrow_model_has_blocks_and_a_last_norm_and_no_more(config):
    with torch.device("meta"):
        narrow = narrow_model(AutoModel.from_config(config), 4)
    outside = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in narrow.named_parameters() if not any(map(str.isdigit, name))}
    assert outside <= {"norm", "final_layer_norm", "ln_f"}
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.float32}


def test_it_hands_its_first_block_what_it_takes_and_no_positions():
    config = OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99, word_embed_proj_dim=16)
    narrow, given, seen = narrow_model(AutoModel.from_config(config), 2), torch.randn(2, 5, 16), []
    narrow.decoder.layers[0].register_forward_pre_hook(lambda _block, args: seen.append(args[0]))
    narrow.eval()(inputs_embeds=given)
    assert torch.equal(seen[0], given)


def test_relative_positions_from_outside_the_blocks_are_refused():
    config = DebertaV2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, relative_attention=True)
    with torch.device("meta"), pytest.raises(TightfitError, match="read relative positions from outside"):
        narrow_model(AutoModel.from_config(config), 2)
