"""Thin: landmarks and repeats as plain sequences, against a sum over all blocks; and the thinned copy of a model."""

import random
from bisect import bisect

import pytest
import torch
from transformers import AutoConfig, Gemma2ForCausalLM, LlamaForCausalLM

from tightfit.describe.blocks import blocks_of, signature
from tightfit.rehearse.thin import landmarks, names_of, repeats, thinned
from tightfit.techniques.nf4 import NF4
from tightfit.techniques.recompute import Recompute

SEQUENCES = ["a", "aa", "aaaaaa", "abababab", "aaaaabbb", "abbbbbbb", "dddsdddsddds", "aaaaafaaaaafaaaaaf", "abcabcabcab", "abcdef"]


def moments(kinds, keeps, gives, holds):
    """The bytes while each block runs: what those before it keep, what those after it have given, and what it holds itself."""
    return [
        sum(keeps[kind] for kind in kinds[:place]) + sum(gives[kind] for kind in kinds[place + 1 :]) + holds[kinds[place]]
        for place in range(len(kinds))
    ]


@pytest.mark.parametrize("kinds", [*SEQUENCES, *["".join(random.Random(seed).choices("abc", k=20)) for seed in range(20)]])
def test_landmarks_extend_exactly(kinds):
    """Rehearse the landmarks, add one of each group in turn, extend: every landmark's bytes are those of the whole sequence."""
    chance = random.Random(kinds)
    sizes = [{kind: chance.randrange(1000) for kind in sorted(set(kinds))} for _ in range(3)]
    marks = landmarks(kinds)

    def at_landmarks(places):
        found = moments([kinds[place] for place in places], *sizes)
        return [found[places.index(mark)] for mark in marks]

    base = at_landmarks(marks)
    result = base
    for group in repeats(kinds):
        deeper = at_landmarks(sorted([*marks, group[0]]))
        result = [now + len(group) * (more - less) for now, more, less in zip(result, deeper, base, strict=True)]
    whole = moments(kinds, *sizes)
    assert result == [whole[mark] for mark in marks]
    assert sorted([*marks, *(place for group in repeats(kinds) for place in group)]) == list(range(len(kinds)))


@pytest.mark.parametrize("kinds", ["aaaaaa", "abababab", "aaaaabbb", "abcabcabcab"])
def test_a_landmark_holds_the_peak_of_a_pattern(kinds):
    for seed in range(50):
        chance = random.Random(seed)
        whole = moments(kinds, *[{kind: chance.randrange(1000) for kind in sorted(set(kinds))} for _ in range(3)])
        assert max(whole) == max(whole[mark] for mark in landmarks(kinds))


@pytest.mark.parametrize("kinds", SEQUENCES)
def test_names_outlive_a_further_block(kinds):
    marks = landmarks(kinds)
    names = names_of([kinds[place] for place in marks])
    assert len(set(names)) == len(names) and "blocks" not in names
    for group in repeats(kinds):
        deeper = names_of([kinds[place] for place in sorted([*marks, group[0]])])
        assert deeper.pop(bisect(marks, group[0])) == "blocks"
        assert deeper == names


def gemma():
    """Six blocks that look alternately at a window and at all."""
    values = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}
    with torch.device("meta"):
        return Gemma2ForCausalLM._from_config(
            AutoConfig.for_model("gemma2", **values, num_key_value_heads=1, head_dim=16, sliding_window=8), dtype=torch.float32
        )


def test_a_thinned_copy_keeps_its_blocks_and_its_lists_in_step():
    model = gemma()
    thin = thinned(model, [{0, 3, 5}])
    assert [block.self_attn.layer_idx for _, block in blocks_of(thin)] == [0, 3, 5]
    assert thin.model.config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert len(model.config.layer_types) == len(thin.config.layer_types) == len(model.model.layers) == 6
    theirs = {id(module) for module in model.modules()}
    assert not [module for module in thin.modules() if id(module) in theirs]
    assert thin.lm_head.weight is thin.model.embed_tokens.weight


def test_wrapped_forwards_belong_to_the_copy():
    model = gemma()
    Recompute(every=2).apply(model)
    thin = thinned(model, [{0, 1, 4}])
    assert ["forward" in vars(block) for _, block in blocks_of(thin)] == [True, False, True]
    assert all(vars(block)["forward"].args[-1].__self__ is block for _, block in blocks_of(thin)[::2])


def llama():
    values = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    with torch.device("meta"):
        return LlamaForCausalLM._from_config(AutoConfig.for_model("llama", **values), dtype=torch.float32)


def kinds_after(technique, model):
    technique.apply(model)
    return ["abcdef"[number] for number in _numbers([signature(block) for _, block in blocks_of(model)])]


def _numbers(items):
    order = list(dict.fromkeys(items))
    return [order.index(item) for item in items]


def test_a_kind_tells_how_a_block_is_wrapped_quantized_and_attends():
    assert kinds_after(Recompute(), llama()) == list("aaaa")
    assert kinds_after(Recompute(every=2), llama()) == list("abab")
    assert kinds_after(Recompute(every=3), llama()) == list("abba")
    assert kinds_after(NF4(where=r"layers\.[12]\."), llama()) == list("abba")
    assert kinds_after(Recompute(every=4), gemma()) == list("abcbab")
