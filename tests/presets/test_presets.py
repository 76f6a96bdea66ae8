"""Presets: each file is a config that transformers takes, and the model it describes has the published number of parameters."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from tightfit.describe.source import describe

FOLDER = Path(__file__).parents[2] / "src/tightfit/presets"
FILES = sorted(FOLDER.glob("*.json"))

# Published count; elements of that count which are no parameter of the class built here (0 where the two agree); relative tolerance.
# "HF" is the element count in the safetensors metadata of the Hugging Face repository named.
PUBLISHED = {
    "bert-base": (110_106_428, 592_130, 0),  # HF google-bert/bert-base-uncased, with the pooler and the next-sentence head
    "bloom-7.1b": (7_069_016_064, 0, 0),  # model card of bigscience/bloom-7b1
    "cpm-2-11b": (11_000_000_000, 0, 0.01),  # arXiv 2106.10715: 11B; the output embedding is not tied
    "falcon-40b": (41_835_970_560, 65_024 * 8192, 0),  # HF tiiuae/falcon-40b (83,671,941,120 bytes in bfloat16), tied head stored
    "gemma-2-2b": (2_614_341_888, 0, 0),  # HF google/gemma-2-2b
    "gpt-j-6b": (6_053_381_344, 0, 0.001),  # model card of EleutherAI/gpt-j-6b, counted in the JAX code
    "gpt-neox-20b": (20_554_567_680, 0, 0),  # model card of EleutherAI/gpt-neox-20b
    "gpt2": (137_022_720, 12 * 1024 * 1024, 0),  # HF openai-community/gpt2, with a causal mask stored per layer
    "llama-2-7b": (6_738_417_664, 32 * 64, 0),  # HF meta-llama/Llama-2-7b-hf, with inv_freq stored per layer
    "llama-2-13b": (13_015_866_880, 40 * 64, 0),  # HF meta-llama/Llama-2-13b-hf, with inv_freq stored per layer
    "llama-2-70b": (68_976_653_312, 80 * 64, 0),  # HF meta-llama/Llama-2-70b-hf, with inv_freq stored per layer
    "llama-3.1-8b": (8_030_261_248, 0, 0),  # HF meta-llama/Llama-3.1-8B
    "llama-3.1-70b": (70_553_706_496, 0, 0),  # HF meta-llama/Llama-3.1-70B
    "llama-3.1-405b": (405_853_388_800, 0, 0),  # HF meta-llama/Llama-3.1-405B
    "llama-3.2-1b": (1_235_814_400, 0, 0),  # HF meta-llama/Llama-3.2-1B
    "mistral-7b": (7_241_732_096, 0, 0),  # HF mistralai/Mistral-7B-v0.1
    "mixtral-8x7b": (46_702_792_704, 0, 0),  # HF mistralai/Mixtral-8x7B-v0.1
    "nllb-moe-54b": (54_500_000_000, 0, 0.001),  # arXiv 2207.04672: 54.5B
    "opt-1.3b": (1_300_000_000, 0, 0.02),  # arXiv 2205.01068, table 1: two digits
    "opt-2.7b": (2_700_000_000, 0, 0.02),  # arXiv 2205.01068, table 1: two digits
    "opt-6.7b": (6_658_473_984, 0, 0),  # index of facebook/opt-6.7b: 13,316,947,968 bytes in float16
    "opt-13b": (13_000_000_000, 0, 0.015),  # arXiv 2205.01068, table 1: two digits
    "opt-30b": (30_000_000_000, 0, 0.005),  # arXiv 2205.01068, table 1: two digits
    "opt-66b": (66_000_000_000, 0, 0.005),  # arXiv 2205.01068, table 1: two digits
    "pythia-1b": (1_011_781_632, 0, 0),  # model card of EleutherAI/pythia-1b
    "qwen3-0.6b": (751_632_384, 151_936 * 1024, 0),  # HF Qwen/Qwen3-0.6B, tied head stored
    "qwen3-8b": (8_190_735_360, 0, 0),  # HF Qwen/Qwen3-8B
    "qwen3-30b-a3b": (30_532_122_624, 0, 0),  # HF Qwen/Qwen3-30B-A3B
    "qwen3-32b": (32_762_123_264, 0, 0),  # HF Qwen/Qwen3-32B
    "roberta-large": (355_412_057, 0, 0),  # HF FacebookAI/roberta-large, float32 elements
    "t5-xxl-encoder": (4_762_310_656, 0, 0),  # HF black-forest-labs/FLUX.1-dev, text_encoder_2: the T5 v1.1 XXL encoder
    "tinyllama-1.1b": (1_100_048_384, 0, 0),  # HF TinyLlama/TinyLlama-1.1B-Chat-v1.0
    "vit-base": (86_567_656, 0, 0),  # HF google/vit-base-patch16-224
}


def name(path):
    """The preset's name: the file's name without the ending."""
    return path.name.removesuffix(".json")


def read(path):
    """The config in the file, as a dict."""
    return json.loads(path.read_text())


def config_of(path):
    """The transformers config that the file describes."""
    fields = read(path)
    return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)


def test_every_preset_has_a_published_count():
    assert {name(path) for path in FILES} == set(PUBLISHED)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_file_is_in_the_common_form(path):
    fields = read(path)
    assert re.fullmatch(r"[a-z0-9]+([-.][a-z0-9]+)*", name(path))
    assert list(fields)[:3] == ["architectures", "model_type", "dtype"]
    assert fields["dtype"] in ("bfloat16", "float16", "float32")
    assert path.read_text() == json.dumps(fields, indent=2) + "\n"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_transformers_reads_it_the_same_both_ways(path, tmp_path):
    (tmp_path / "config.json").write_bytes(path.read_bytes())
    config = config_of(path)
    folder = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.to_diff_dict() == folder.to_diff_dict()
    assert config.dtype == getattr(torch, read(path)["dtype"])
    assert config.architectures == read(path)["architectures"]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_head_is_tied_where_the_file_says_so(path):
    """Also where the config's class ties whatever it is told (T5's)."""
    model = describe(name(path), "embed").meta_model()
    head = model.get_output_embeddings()
    if head is not None and head.weight.shape == model.get_input_embeddings().weight.shape:
        assert (head.weight is model.get_input_embeddings().weight) == read(path).get(
            "tie_word_embeddings", config_of(path).tie_word_embeddings
        )


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_parameter_count_is_the_published_one(path):
    model = describe(name(path), "embed").meta_model()
    assert type(model).__name__ == read(path)["architectures"][0]
    count = sum(p.numel() for p in model.parameters())  # parameters() gives a tied tensor once
    published, other, tolerance = PUBLISHED[name(path)]
    assert abs(count - (published - other)) <= tolerance * published
