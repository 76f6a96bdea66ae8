"""Ties: what the config ties and a checkpoint holds apart is built and counted as `from_pretrained` loads it."""

import json

import pytest
import torch
from families import ids, make
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tightfit.describe.blocks import blocks_of
from tightfit.describe.source import describe
from tightfit.rehearse.fake import inputs_for
from tightfit.runtime.build import build
from tightfit.terms.errors import TightfitError
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload

CLASSES = {"t5": AutoModelForSeq2SeqLM, "llama-tied": AutoModelForCausalLM}
EMBEDDING = {"t5": "shared.weight", "llama-tied": "model.embed_tokens.weight"}


def with_head(saved, folder, family, head, drop=()):
    """A checkpoint of `family` that holds `lm_head.weight` too; `head` makes it from the embedding."""
    folder.mkdir()
    (folder / "config.json").write_bytes((saved(family) / "config.json").read_bytes())
    tensors = load_file(saved(family) / "model.safetensors")
    tensors["lm_head.weight"] = head(tensors[EMBEDDING[family]])
    save_file({name: tensor for name, tensor in tensors.items() if name not in drop}, folder / "model.safetensors", {"format": "pt"})
    return folder


def assert_same(folder, family):
    theirs = CLASSES[family].from_pretrained(folder).eval()
    skeleton = describe(str(folder))
    assert skeleton.weight_bytes() == sum(parameter.numel() * 4 for parameter in theirs.parameters())
    plan = Plan.all_resident(str(folder), Workload(), len(blocks_of(theirs)), {})
    with build(plan, skeleton) as held, torch.no_grad():
        mine = dict(held.model.named_parameters(remove_duplicate=False))
        for name, parameter in theirs.named_parameters(remove_duplicate=False):
            assert torch.equal(mine[name], parameter), name
        batch = inputs_for(theirs, Workload("embed", 2, 16), ids)
        assert torch.equal(held.model(**batch).logits, theirs(**batch).logits)
        head, embedding = mine["lm_head.weight"], mine[EMBEDDING[family]]
        return head.data_ptr() == embedding.data_ptr()


@pytest.mark.parametrize("family", CLASSES)
def test_a_head_of_its_own_is_built_and_counted(family, saved, tmp_path):
    folder = with_head(saved, tmp_path / "apart", family, lambda weight: weight.flip(0).contiguous())
    assert not assert_same(folder, family)
    assert describe(str(folder)).weight_bytes() > describe(str(saved(family))).weight_bytes()


@pytest.mark.parametrize("family", CLASSES)
def test_one_value_decides(family, saved, tmp_path):
    def last_differs(weight):
        head = weight.clone()
        head[-1, -1] += 1
        return head

    assert not assert_same(with_head(saved, tmp_path / "apart", family, last_differs), family)


@pytest.mark.parametrize("family", CLASSES)
def test_an_equal_head_stays_tied(family, saved, tmp_path):
    assert assert_same(with_head(saved, tmp_path / "same", family, torch.clone), family)


@pytest.mark.parametrize("family", CLASSES)
def test_a_head_alone_is_the_embedding_too(family, saved, tmp_path):
    folder = with_head(saved, tmp_path / "alone", family, lambda weight: weight.flip(0).contiguous(), drop=[EMBEDDING[family]])
    assert assert_same(folder, family)


def test_a_head_of_another_shape_is_refused(saved, tmp_path):
    folder = with_head(saved, tmp_path / "short", "llama-tied", lambda weight: weight[:-1].clone())
    with pytest.raises(TightfitError, match=r"`lm_head.weight` has shape \[383, 64\]"):
        describe(str(folder))


def test_a_preset_and_a_shape_alone_are_what_their_file_says(tmp_path):
    """T5's config class ties whatever it is told; the word in the file is the only one there is without a checkpoint."""
    values = make("t5").config.to_dict()
    sizes = {}
    for word in (True, False):
        (tmp_path / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": word}))
        sizes[word] = describe(str(tmp_path), random_weights=True).weight_bytes()
    assert sizes[False] - sizes[True] == 384 * 64 * 4
    assert describe("cpm-2-11b").untied == ("lm_head.weight",)
    assert describe("t5-xxl-encoder", "embed").untied == ()
