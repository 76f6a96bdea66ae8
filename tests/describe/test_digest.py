"""Digest: another word for other weights, the same word for the same weights wherever they lie."""

import json
import re

import pytest
import torch
import transformers
from families import CONFIGS, make
from safetensors.torch import load_file, save_file

from tightfit.describe.checkpoint import read_header
from tightfit.describe.digest import SAMPLE_BYTES, digest_of
from tightfit.describe.source import describe
from tightfit.terms.errors import TightfitError


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a tiny Llama that may be written to, with its `up_proj` of 40 KiB each."""
    for file in saved("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def flip(file, offset):
    """One bit of the lowest byte of a number."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(bytes(data))


NAME = "model.layers.2.mlp.up_proj.weight"
BYTES = 160 * 64 * 4


@pytest.mark.parametrize("place", [0, SAMPLE_BYTES - 4, BYTES // 2, BYTES - 4, (BYTES - SAMPLE_BYTES) // 2])
def test_one_changed_bit_of_a_sample_is_seen(folder, place):
    before = digest_of(describe(str(folder)))
    flip(folder / "model.safetensors", read_header(folder / "model.safetensors")[NAME].offset + place)
    assert digest_of(describe(str(folder))) != before


def test_a_small_tensor_is_read_whole(folder):
    before = digest_of(describe(str(folder)))
    record = read_header(folder / "model.safetensors")["model.norm.weight"]
    for place in range(0, record.nbytes, 40):
        flip(folder / "model.safetensors", record.offset + place)
        assert digest_of(describe(str(folder))) != before
        flip(folder / "model.safetensors", record.offset + place)
    assert digest_of(describe(str(folder))) == before


def test_only_samples_are_read(folder):
    before = digest_of(describe(str(folder)))
    flip(folder / "model.safetensors", read_header(folder / "model.safetensors")[NAME].offset + BYTES // 4)
    assert digest_of(describe(str(folder))) == before


def test_shards_and_order_make_no_difference(folder):
    before = digest_of(describe(str(folder)))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    shards = {f"part-{at}.safetensors": names[at::3] for at in range(3)}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt", "more": "x" * len(file)})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}})
    )
    assert digest_of(describe(str(folder))) == before


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_a_tied_weight_may_be_stored_under_either_name_or_both(saved, tmp_path, kept):
    for file in saved("llama-tied").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    words = tensors.pop("model.embed_tokens.weight")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        if kept in (name, "both"):
            tensors[name] = words.clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert digest_of(describe(str(tmp_path))) == digest_of(describe(str(saved("llama-tied"))))


@pytest.mark.parametrize("family", [family for family in CONFIGS if family not in ("qwen3-moe", "mixtral")])
def test_a_live_model_has_the_digest_of_its_folder(saved, family):
    folder = saved(family)
    live = getattr(transformers, CONFIGS[family][0]).from_pretrained(folder)
    assert digest_of(describe(live)) == digest_of(describe(str(folder), "tune"))
    with torch.no_grad():
        list(live.parameters())[-1].view(-1)[-1] += 1
    assert digest_of(describe(live)) != digest_of(describe(str(folder), "tune"))


def test_experts_that_are_joined_are_sampled_as_they_are_stored(saved, tmp_path):
    for file in saved("mixtral").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = digest_of(describe(str(tmp_path)))
    assert before == digest_of(describe(str(saved("mixtral"))))
    name = next(name for name in read_header(tmp_path / "model.safetensors") if re.search(r"layers\.3.*experts\.2", name))
    flip(tmp_path / "model.safetensors", read_header(tmp_path / "model.safetensors")[name].offset)
    assert digest_of(describe(str(tmp_path))) != before


@pytest.mark.parametrize(
    ("key", "value"), [("num_attention_heads", 2), ("rope_theta", 5000.0), ("rms_norm_eps", 1e-3), ("hidden_act", "gelu")]
)
def test_what_the_config_tells_beyond_shapes_counts(folder, key, value):
    before = digest_of(describe(str(folder)))
    values = json.loads((folder / "config.json").read_text())
    if key == "num_attention_heads":
        values |= {"num_key_value_heads": 1, "head_dim": 32}
    if key == "rope_theta":
        values["rope_parameters"]["rope_theta"] = value
    (folder / "config.json").write_text(json.dumps(values | {key: value}))
    assert digest_of(describe(str(folder))) != before


def test_what_changes_no_output_does_not_count(folder):
    before = digest_of(describe(str(folder)))
    values = json.loads((folder / "config.json").read_text())
    more = {"transformers_version": "9.0", "use_cache": False, "eos_token_id": 3, "initializer_range": 0.5}
    (folder / "config.json").write_text(json.dumps(values | more))
    assert digest_of(describe(str(folder))) == before


def test_a_shape_without_weights_is_marked():
    found = digest_of(describe("llama-2-70b"))
    assert found.startswith("shape:") and found == digest_of(describe("llama-2-70b"))
    assert found != digest_of(describe("llama-2-13b"))
    assert digest_of(describe("tightfit-demo")).startswith("sha256:")
    assert digest_of(describe("tightfit-demo", random_weights=True)).startswith("shape:")
    assert digest_of(describe(make("llama").to("meta"))).startswith("shape:")


def test_another_precision_is_another_base(saved, tmp_path):
    make("llama", torch.bfloat16).save_pretrained(tmp_path)
    assert digest_of(describe(str(tmp_path))) != digest_of(describe(str(saved("llama"))))


@pytest.mark.parametrize(("spoil", "said"), [("missing", "is not here"), ("short", "ends too early")])
def test_files_that_went_bad_meanwhile(folder, spoil, said):
    skeleton, file = describe(str(folder)), folder / "model.safetensors"
    if spoil == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:4000])
    with pytest.raises(TightfitError, match=said) as caught:
        digest_of(skeleton)
    assert caught.value.hint
