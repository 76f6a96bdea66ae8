"""Build: buffers that a checkpoint holds, and the precision of each tensor, as `from_pretrained` loads them."""

import pytest
import torch
import transformers
from families import ids
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import tightfit
from tightfit.describe.blocks import blocks_of
from tightfit.describe.skeleton import persistent_buffers
from tightfit.describe.source import describe
from tightfit.planner.weigh import weigh
from tightfit.rehearse.fake import inputs_for
from tightfit.runtime.build import build
from tightfit.terms.errors import TightfitError
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload

_WIDTH = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {
    "DeepseekV3ForCausalLM": ("deepseek_v3", {**_WIDTH, **_EXPERTS, **_LATENT, "n_group": 2, "topk_group": 1}),
    "Glm4MoeForCausalLM": ("glm4_moe", {**_WIDTH, **_EXPERTS, "head_dim": 16, "n_group": 1, "topk_group": 1}),
}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
CORRECTION = "e_score_correction_bias"


@pytest.fixture(scope="module", params=ROUTED)
def routed(request, tmp_path_factory):
    """A saved mixture of experts in bfloat16 whose routers' corrections are not the zeros they are born with."""
    folder = tmp_path_factory.mktemp(request.param)
    model_type, values = ROUTED[request.param]
    torch.manual_seed(0)
    model = getattr(transformers, request.param)._from_config(AutoConfig.for_model(model_type, **values), dtype=torch.bfloat16)
    for name, buffer in model.named_buffers():
        if CORRECTION in name:
            buffer.copy_(torch.randn(buffer.shape))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def half_t5(tmp_path_factory):
    """A saved T5 in float16, whose feed-forward outputs are to be float32."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration._from_config(AutoConfig.for_model("t5", **T5), dtype=torch.float16).save_pretrained(folder)
    return folder


def built(folder, source=None, random_weights=False):
    """The model in `folder` with every block resident."""
    skeleton = describe(source or str(folder), random_weights=random_weights)
    plan = Plan.all_resident(str(folder), Workload("generate", 1, 16), len(blocks_of(skeleton.meta_model())), {})
    return build(plan if not random_weights else plan.__class__(**{**vars(plan), "random_weights": True}), skeleton)


def tensors_of(model):
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def assert_same(folder):
    """Names, dtypes, values and output are those of `from_pretrained(dtype="auto")`, and the plan weighs them so."""
    config = AutoConfig.from_pretrained(folder)
    theirs = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype="auto").eval()
    skeleton = describe(str(folder))
    assert skeleton.weight_bytes() == sum(parameter.nbytes for parameter in theirs.parameters())
    weights = weigh(skeleton, ())
    assert sum(weights.blocks) + weights.outside == sum(tensor.nbytes for tensor in (*theirs.parameters(), *theirs.buffers()))
    with built(folder) as held, torch.no_grad():
        mine, other = tensors_of(held.model), tensors_of(theirs)
        assert mine.keys() == other.keys()
        assert [name for name in mine if mine[name].dtype != other[name].dtype or not torch.equal(mine[name], other[name])] == []
        batch = inputs_for(theirs, Workload("embed", 2, 16), ids)
        assert torch.equal(held.model(**batch).logits, theirs(**batch).logits)


def test_a_routers_correction_is_read(routed):
    assert_same(routed)
    with built(routed) as held:
        corrections = [buffer for name, buffer in held.model.named_buffers() if CORRECTION in name]
        assert len(corrections) == 2 and all(buffer.dtype == torch.float32 and buffer.abs().min() > 0 for buffer in corrections)


def test_a_missing_correction_is_refused(routed, tmp_path):
    (tmp_path / "config.json").write_bytes((routed / "config.json").read_bytes())
    tensors = load_file(routed / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if CORRECTION not in name}, tmp_path / "model.safetensors")
    with pytest.raises(TightfitError, match=f"{CORRECTION}` is not in the checkpoint"):
        describe(str(tmp_path))


def test_a_correction_of_another_shape_is_refused(routed, tmp_path):
    (tmp_path / "config.json").write_bytes((routed / "config.json").read_bytes())
    tensors = load_file(routed / "model.safetensors")
    changed = {name: tensor[:-1].clone() if CORRECTION in name else tensor for name, tensor in tensors.items()}
    save_file(changed, tmp_path / "model.safetensors")
    with pytest.raises(TightfitError, match=rf"{CORRECTION}` has shape \[3\], the config says \[4\]"):
        describe(str(tmp_path))


def test_a_buffer_that_transformers_computes_may_be_missing(tmp_path):
    values = {"vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = AutoConfig.for_model("bart", **values, encoder_attention_heads=2, decoder_attention_heads=2)
    model = transformers.BartForConditionalGeneration(config)
    assert "final_logits_bias" in persistent_buffers(model)
    model.save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    tensors.pop("final_logits_bias", None)
    save_file(tensors, tmp_path / "bare" / "model.safetensors")
    assert_same(tmp_path / "bare")


def test_a_live_routers_correction_is_its_own(routed):
    config = AutoConfig.from_pretrained(routed)
    live = getattr(transformers, config.architectures[0]).from_pretrained(routed).eval()
    with built(routed, source=live) as held:
        mine = tensors_of(held.model)
        assert [name for name, tensor in tensors_of(live).items() if not torch.equal(mine[name], tensor)] == []


def test_made_up_weights_leave_a_correction_as_it_is_born(routed):
    with built(routed, random_weights=True) as held:
        corrections = [buffer for name, buffer in held.model.named_buffers() if CORRECTION in name]
        assert len(corrections) == 2 and not any(buffer.any() for buffer in corrections)


def test_what_transformers_keeps_in_float32_is_weighed_and_built_so(half_t5):
    assert_same(half_t5)
    with built(half_t5) as held, built(half_t5, random_weights=True) as made_up:
        for model in (held.model, made_up.model):
            kinds = {name: tensor.dtype for name, tensor in model.named_parameters()}
            assert {dtype for name, dtype in kinds.items() if ".wo." in name} == {torch.float32}
            assert {dtype for name, dtype in kinds.items() if ".wo." not in name} == {torch.float16}
    plan = tightfit.plan(str(half_t5), Workload(tokens=16, new_tokens=4), tightfit.Budget(ram=1 << 34))
    assert plan.predicted["ram"]["weights"] == sum(weigh(describe(str(half_t5)), ()).blocks) + weigh(describe(str(half_t5)), ()).outside


def test_bfloat16_keeps_only_what_is_strict(half_t5, tmp_path):
    (tmp_path / "config.json").write_text((half_t5 / "config.json").read_text().replace("float16", "bfloat16"))
    tensors = load_file(half_t5 / "model.safetensors")
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same(tmp_path)
    assert {parameter.dtype for parameter in describe(str(tmp_path)).meta_model().parameters()} == {torch.bfloat16}


def test_a_block_with_a_converted_tensor_does_not_stream_from_the_checkpoint(half_t5):
    """`wo` lies there in float16 and rests in float32, so the blocks go through the spill file; the text stays the same."""
    skeleton = describe(str(half_t5))
    count = len(blocks_of(skeleton.meta_model()))
    homes = ("ram", *["disk"] * (count - 1))
    settings = {"offload": {"streamed": list(range(1, count))}}
    workload = Workload("generate", 1, 16, 4)
    plan = Plan(str(half_t5), workload, tightfit.Budget(ram=1 << 34), "exact", settings, homes, {"ram": {"weights": 1}}, {}, {})
    batch = inputs_for(skeleton.meta_model(), Workload("embed", 1, 16), ids)
    with build(plan, skeleton) as streamed, built(half_t5) as resident, torch.no_grad():
        assert torch.equal(streamed.model(**batch).logits, resident.model(**batch).logits)
