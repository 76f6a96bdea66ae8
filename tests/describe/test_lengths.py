"""Lengths: the same limit for a plan and for a run, side by side, at the very token where a model's own table ends."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

import tightfit
from tightfit.describe.lengths import check_lengths, positions_of
from tightfit.describe.source import describe
from tightfit.rehearse.fake import inputs_for
from tightfit.runtime.tokens import encode
from tightfit.terms.errors import TightfitError
from tightfit.terms.workload import Workload

SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TABLES = {
    "bert": {**SMALL, "max_position_embeddings": 20},
    "roberta": {**SMALL, "max_position_embeddings": 20},
    "camembert": {**SMALL, "max_position_embeddings": 20},
    "xlm-roberta": {**SMALL, "max_position_embeddings": 20, "pad_token_id": 5},
    "mpnet": {**SMALL, "max_position_embeddings": 20},
    "opt": {**SMALL, "ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 20},
    "gpt2": {"vocab_size": 50, "n_positions": 20, "n_embd": 16, "n_layer": 1, "n_head": 2},
}


@pytest.mark.parametrize("model_type", TABLES)
def test_the_limit_is_where_the_table_of_the_model_ends(model_type):
    config = AutoConfig.for_model(model_type, **TABLES[model_type])
    model = AutoModel.from_config(config).eval()
    usable = positions_of(config)
    with torch.no_grad():
        model(input_ids=torch.full((1, usable), 7))
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            model(input_ids=torch.full((1, usable + 1), 7))
    check_lengths(config, usable)
    with pytest.raises(TightfitError, match=f"more than the model's {usable} positions"):
        check_lengths(config, usable + 1)


def test_relative_positions_have_no_limit():
    for model_type in ("t5", "bloom"):
        assert positions_of(AutoConfig.for_model(model_type)) is None
    assert positions_of(AutoConfig.for_model("t5", n_positions=512)) is None


def test_a_decoder_holds_prompt_and_new_tokens_together():
    config = AutoConfig.for_model("llama", max_position_embeddings=100)
    check_lengths(config, 60, 40)
    with pytest.raises(TightfitError, match="60 tokens and 41 new ones make 101") as caught:
        check_lengths(config, 60, 41)
    assert "--max-new-tokens 40" in caught.value.hint


def test_an_encoder_decoder_model_holds_each_on_its_side():
    config = AutoConfig.for_model("nllb-moe", max_position_embeddings=100)
    check_lengths(config, 100, 100)
    for tokens, new_tokens in ((101, 1), (1, 101)):
        with pytest.raises(TightfitError, match="101"):
            check_lengths(config, tokens, new_tokens)


def test_a_plan_and_a_run_draw_one_line():
    """`tightfit-demo` has 1,024 positions: 1,000 tokens leave room for 24."""
    skeleton, budget = describe("tightfit-demo"), tightfit.Budget(ram=1 << 34)
    text = "a" * 3000
    tokens = encode(skeleton, text, new_tokens=-1).length
    assert tokens > 1024
    with pytest.raises(TightfitError) as planned:
        tightfit.plan(skeleton, Workload(tokens=tokens), budget)
    with pytest.raises(TightfitError) as ran:
        encode(skeleton, text, new_tokens=128)
    assert "1024 positions" in str(planned.value) and "1024 positions" in str(ran.value)
    inputs_for(skeleton.meta_model(), Workload(tokens=1000, new_tokens=24))
    with pytest.raises(TightfitError):
        inputs_for(skeleton.meta_model(), Workload(tokens=1000, new_tokens=25))
