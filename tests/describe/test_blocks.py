"""Blocks: the stacks of repeated blocks of every family, and what stands outside them."""

import pytest
import torch
from families import CONFIGS, make
from torch import nn

from tightfit.describe.blocks import block_lists, blocks_of, outside_blocks, signature

STACKS = {
    "llama": ["model.layers"],
    "gpt-neox": ["gpt_neox.layers"],
    "opt": ["model.decoder.layers"],
    "bloom": ["transformer.h"],
    "gpt2": ["transformer.h"],
    "t5": ["encoder.block", "decoder.block"],
    "bert": ["bert.encoder.layer"],
    "qwen3-moe": ["model.layers"],
    "mixtral": ["model.layers"],
}


@pytest.mark.parametrize("family", STACKS)
def test_stacks_are_found_where_transformers_has_them(family):
    model = make(family)
    assert [path for path, _ in block_lists(model)] == STACKS[family]
    assert [path for path, _ in blocks_of(model)] == [f"{path}.{index}" for path in STACKS[family] for index in range(4)]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_parameter_is_in_one_block_or_outside(family):
    model = make(family)
    inside = [id(parameter) for _, block in blocks_of(model) for parameter in block.parameters()]
    outside = [id(parameter) for _, parameter in outside_blocks(model)]
    assert sorted(inside + outside) == sorted(id(parameter) for parameter in model.parameters())
    assert len(blocks_of(model)) == (8 if family == "t5" else 4)


def test_a_model_without_stacks_has_no_blocks():
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))) == []


def test_blocks_of_one_kind_share_a_signature():
    first, second, *_ = [block for _, block in blocks_of(make("llama"))]
    assert signature(first) == signature(second)
    second.mlp.up_proj.weight = nn.Parameter(torch.empty(4, 4))
    assert signature(first) != signature(second)
