"""Source: what is described and built from a checkpoint is what transformers' own `from_pretrained` loads, bit for bit."""

import json
from contextlib import ExitStack

import pytest
import torch
import transformers
from families import CONFIGS, GENERATES, ids, make
from safetensors.torch import load_file, save_file

import tightfit
from tightfit.describe.blocks import blocks_of
from tightfit.describe.source import describe
from tightfit.rehearse.fake import inputs_for
from tightfit.runtime.build import build
from tightfit.terms.errors import TightfitError
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload


def task_of(family):
    return "generate" if family in GENERATES else "embed"


def built(folder, task="generate", **changes):
    """The model in `folder`, every block resident and nothing changed."""
    skeleton = describe(str(folder), task)
    count = len(blocks_of(skeleton.meta_model()))
    return build(Plan.all_resident(str(folder), Workload(task, 1, 16), count, changes), skeleton)


def logits(model):
    with torch.no_grad():
        return model(**inputs_for(model, Workload("embed", 2, 24), ids)).logits


def reference(folder, dtype=None):
    config = json.loads((folder / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    return model_class.from_pretrained(folder, dtype=dtype or config["dtype"]).eval()


def assert_same(folder, task="generate", dtype=None):
    """Parameters, buffers and outputs are those of `from_pretrained`, and nothing else is there; tied ones take memory once."""
    theirs = reference(folder, dtype)
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in theirs.parameters())
    assert describe(str(folder), task).weight_bytes() == weight_bytes
    with built(folder, task) as held:
        ours = held.model
        for left, right in (
            (ours.named_parameters(remove_duplicate=False), theirs.named_parameters(remove_duplicate=False)),
            (ours.named_buffers(), theirs.named_buffers()),
        ):
            mine, other = dict(left), dict(right)
            assert mine.keys() == other.keys()
            assert [name for name in mine if mine[name].dtype != other[name].dtype or not torch.equal(mine[name], other[name])] == []
        storages = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes() for parameter in ours.parameters()}
        assert sum(storages.values()) == weight_bytes
        assert not ours.training
        assert torch.equal(logits(ours), logits(theirs))
        assert torch.isfinite(logits(ours)).all()


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_built_as_transformers_loads_it(family, saved):
    assert_same(saved(family), task_of(family))


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "t5"])
def test_shards_are_read_as_one_file(family, saved, tmp_path):
    reference(saved(family)).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(tmp_path)


def test_a_tied_head_is_the_embedding(saved):
    with built(saved("llama-tied")) as held:
        assert held.model.lm_head.weight is held.model.model.embed_tokens.weight
    with built(saved("llama")) as held:
        assert held.model.lm_head.weight is not held.model.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_experts_are_stored_apart_and_fused_by_the_build(family, saved):
    stored = load_file(saved(family) / "model.safetensors")
    assert any(".experts.3." in name for name in stored)
    skeleton = describe(str(saved(family)))
    fused = [name for name, parameter in skeleton.meta_model().named_parameters() if parameter.dim() == 3]
    assert len(fused) == 8
    assert all(len(skeleton.origins[name].records) >= 4 for name in fused)


def rewritten(saved_folder, folder, rename=lambda name: name, extra=None, change=lambda name, tensor: tensor):
    """A copy of a checkpoint under other names, with other tensors, in `folder`."""
    folder.mkdir(exist_ok=True)
    for file in saved_folder.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(saved_folder / "model.safetensors")
    changed = {rename(name): change(name, tensor) for name, tensor in tensors.items()}
    save_file(
        {name: tensor for name, tensor in (changed | (extra or {})).items() if tensor is not None},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


@pytest.mark.parametrize(("family", "prefix"), [("bloom", "transformer."), ("gpt2", "transformer."), ("opt", "model."), ("bert", "bert.")])
def test_a_checkpoint_without_the_prefix_of_its_base_is_found(family, prefix, saved, tmp_path):
    """BLOOM and GPT-2 lie on the hub as their bare base model."""
    folder = rewritten(saved(family), tmp_path / "bare", rename=lambda name: name.removeprefix(prefix))
    assert load_file(folder / "model.safetensors").keys() != load_file(saved(family) / "model.safetensors").keys()
    assert_same(folder, task_of(family))


def test_a_checkpoint_may_store_what_the_model_computes(saved, tmp_path):
    """Llama 2 lies on the hub with rotary frequencies, GPT-2 with causal masks, in every layer; a tied head may be stored too."""
    extra = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.full((8,), 7.0) for layer in range(4)}
    assert_same(rewritten(saved("llama"), tmp_path / "llama", extra=extra))
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 256, 256, dtype=torch.bool) for layer in range(4)}
    assert_same(rewritten(saved("gpt2"), tmp_path / "gpt2", extra=masks))
    head = load_file(saved("llama-tied") / "model.safetensors")["model.embed_tokens.weight"]
    assert_same(rewritten(saved("llama-tied"), tmp_path / "tied", extra={"lm_head.weight": head.clone()}))


def test_few_tensors_of_another_precision_take_that_of_the_most(saved, tmp_path):
    folder = rewritten(
        saved("llama"), tmp_path / "mixed", change=lambda name, tensor: tensor if "norm" in name else tensor.to(torch.bfloat16)
    )
    assert describe(str(folder)).dtype == torch.bfloat16
    assert_same(folder, dtype=torch.bfloat16)


def test_a_live_module_is_its_own_checkpoint():
    live = make("qwen3")
    skeleton = describe(live)
    assert all(parameter.is_meta for parameter in skeleton.meta_model().parameters())
    with build(Plan.all_resident("live", Workload(), 4, {}), skeleton) as held:
        assert torch.equal(logits(held.model), logits(live))
        assert held.model.lm_head.weight.data_ptr() == live.lm_head.weight.data_ptr()


def test_a_module_that_is_no_model_of_transformers_is_refused():
    with pytest.raises(TightfitError, match="`Sequential` is not a model of transformers") as caught:
        tightfit.plan(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert caught.value.hint


def test_a_preset_has_a_shape_and_no_weights():
    skeleton = describe("llama-2-7b")
    assert skeleton.weight_bytes() == (6_738_417_664 - 32 * 64) * 2
    assert (len(skeleton.block_bytes()), len(set(skeleton.block_bytes())), dict(skeleton.origins)) == (32, 1, {})
    assert describe("LLAMA-2-7B").weight_bytes() == skeleton.weight_bytes()


def test_the_demo_model_comes_with_weights():
    skeleton = describe("tightfit-demo")
    assert skeleton.origins and skeleton.folder.endswith("tightfit-demo")
    assert 8_000_000 <= skeleton.weight_bytes() // skeleton.dtype.itemsize <= 20_000_000
    with ExitStack() as stack:
        held = stack.enter_context(built("tightfit-demo"))
        assert torch.isfinite(logits(held.model)).all()


def test_random_weights_have_the_shape_and_are_the_same_every_time():
    skeleton = describe("tightfit-demo", random_weights=True)
    plan = tightfit.plan(skeleton, Workload(tokens=8, new_tokens=2), tightfit.Budget(ram=1 << 34, disk=1 << 30), random_weights=True)
    with build(plan, skeleton) as first, build(plan, skeleton) as second:
        assert torch.equal(logits(first.model), logits(second.model))
        assert torch.isfinite(logits(first.model)).all()


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("no-such-model", "no model is called"),
        ("llama-2-7", "`llama-2-7b`"),
        ("./nowhere", "no model is called"),
        ("nobody/nothing", "not in the cache"),
        ("a/b/c", "no model is called"),
        ("typo/", "no model is called"),
        ("my model/v1", "no model is called"),
        ("~nobody-of-this-name", "there is no such user"),
    ],
)
def test_an_unknown_name_is_refused(source, word):
    with pytest.raises(TightfitError) as caught:
        describe(source)
    assert word in f"{caught.value} {caught.value.hint}"


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(TightfitError, match="is a file") as caught:
        describe(str(tmp_path / "model.safetensors"))
    assert caught.value.hint


def test_a_model_without_text_does_not_generate(saved):
    for family in ("vit", "bert"):
        with pytest.raises(TightfitError, match="does not write text") as caught:
            describe(str(saved(family)))
        assert "--task embed" in caught.value.hint
