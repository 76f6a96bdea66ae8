"""Weigh: what takes turns and what stays, what loading holds besides, and what a shape without weights is taken to be."""

from dataclasses import replace

import pytest
import torch
from families import CONFIGS, make
from planning import LowRank
from transformers import AutoConfig

from tightfit import catalog
from tightfit.describe.blocks import blocks_of
from tightfit.describe.skeleton import Skeleton
from tightfit.describe.source import describe
from tightfit.formats.image import PIECE_BYTES, READERS
from tightfit.planner.weigh import weigh

BUFFERS = READERS * PIECE_BYTES


def preset(family: str) -> Skeleton:
    """The shape of `family` as a preset describes it: without weights."""
    _, model_type, values = CONFIGS[family]
    model = make(family, torch.bfloat16)
    return Skeleton(family, AutoConfig.for_model(model_type, **values), type(model), torch.bfloat16)


def sizes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_preset_weighs_what_its_saved_model_weighs(family, tmp_path):
    """Whatever transformers joins on loading, it joins for the preset as well."""
    make(family, torch.bfloat16).save_pretrained(tmp_path)
    task = "generate" if "CausalLM" in CONFIGS[family][0] or "Conditional" in CONFIGS[family][0] else "embed"
    real = weigh(describe(str(tmp_path), task), [])
    assert replace(weigh(preset(family), []), staging=real.staging) == real
    assert real.changed == (family in ("mixtral", "qwen3-moe"))


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_that_are_joined_are_beside_their_parts(family):
    """`gate_up_proj` is the largest; encoding takes the dense tensor and 2.5 times one expert's matrix."""
    skeleton = preset(family)
    fused = max(skeleton.meta_model().parameters(), key=lambda parameter: parameter.numel())
    whole = sizes([fused])
    assert fused.dim() == 3
    joined, made_up = weigh(skeleton, []), weigh(skeleton, [], random_weights=True)
    quantized = weigh(skeleton, [catalog.technique("int8")()])
    assert (joined.load_scratch("ram"), joined.load_scratch("gpu")) == (whole, 0)
    assert quantized.load_scratch("ram") == 2 * whole
    assert quantized.load_scratch("gpu") == whole + int(2.5 * (whole // fused.shape[0]))
    assert joined.passing == quantized.passing == 2 * whole + BUFFERS
    assert made_up.passing == whole + BUFFERS


def test_random_weights_that_stream_need_a_spill_file_and_nothing_is_joined():
    """The run makes them up once and writes them down: a shape has no file from which they could be read again."""
    for family in ("llama", "mixtral"):
        assert weigh(preset(family), [], random_weights=True).changed
    assert not weigh(preset("llama"), []).changed


def test_tensors_of_another_precision_are_read_beside_what_they_become(tmp_path):
    model = make("llama", torch.bfloat16)
    model.model.layers[1].mlp.up_proj.float()
    model.save_pretrained(tmp_path)
    weights = weigh(describe(str(tmp_path)), [])
    assert weights.changed
    odd = model.model.layers[1].mlp.up_proj.weight
    assert weights.passing == max(sizes([odd]) * 3 // 2, 384 * 64 * 2) + BUFFERS
    assert weigh(describe(str(tmp_path)), [catalog.technique("int8")()]).read_scratch == sizes([odd]) * 3 // 2


def test_buffers_stay_where_blocks_stream_from_the_models_files():
    """GPT-J keeps its positions in every block; no checkpoint holds them, but a spill file does."""
    skeleton = preset("gptj")
    model = skeleton.meta_model()
    blocks = [block for _, block in blocks_of(model)]
    everything = sizes([*model.parameters(), *model.buffers()])
    assert all(next(block.buffers(), None) is not None for block in blocks)
    stored, spilled = weigh(skeleton, []), weigh(skeleton, [], random_weights=True)
    assert stored.blocks == tuple(sizes(block.parameters()) for block in blocks)
    assert spilled.blocks == tuple(sizes([*block.parameters(), *block.buffers()]) for block in blocks)
    assert stored.outside + sum(stored.blocks) == spilled.outside + sum(spilled.blocks) == everything


def test_what_is_trained_inside_a_block_stays_and_the_rest_takes_turns():
    skeleton = preset("llama")
    plain, tuned = weigh(skeleton, []), weigh(skeleton, [LowRank()], tuned=True)
    pair = 2 * (4 * 64 + 160 * 4)  # bfloat16
    assert tuned.blocks == plain.blocks
    assert tuned.outside == plain.outside + 4 * pair
    assert tuned.take_turns and not tuned.changed
    everything = weigh(skeleton, [], tuned=True)
    assert (everything.blocks, everything.take_turns) == ((0,) * 4, False)
    assert everything.outside == plain.outside + sum(plain.blocks)


def test_a_quantized_base_takes_turns_below_what_is_trained():
    skeleton, int8 = preset("llama"), catalog.technique("int8")()
    plain, tuned = weigh(skeleton, [int8]), weigh(skeleton, [LowRank(), int8], tuned=True)
    assert tuned.blocks == plain.blocks and tuned.changed and tuned.take_turns
    assert tuned.outside == plain.outside + 4 * 2 * (4 * 64 + 160 * 4)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_a_codec_names_the_library_that_it_loads(family):
    made = {name: catalog.technique(name)() for name in ("nf4", "int8")}
    routing = {"routing"} if "mixtral" in family else frozenset()
    assert weigh(preset(family), [made["nf4"]]).extras == {"bitsandbytes"} | routing
    assert weigh(preset(family), [made["int8"]]).extras == weigh(preset(family), []).extras == routing
    experts = catalog.technique("nf4")(where="experts")
    if family == "mixtral":
        assert weigh(preset(family), [experts]).extras == {"bitsandbytes", "routing"}, "experts alone load it too"
