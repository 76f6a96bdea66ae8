"""Generate: sampling, stop tokens and texts, pieces as they are sure; held against Hugging Face `generate` on the same model."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tightfit.describe.source import describe
from tightfit.presets import presets
from tightfit.runtime.build import build
from tightfit.runtime.generate import Sampling, generate
from tightfit.runtime.tokens import Prompt, encode
from tightfit.terms.errors import TightfitError
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload

TEXT = "The sea was calm that morning, and"
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def demo():
    """The demo model, built once."""
    skeleton = describe("tightfit-demo")
    with build(Plan.all_resident("tightfit-demo", Workload("generate", 1, 64, NEW_TOKENS), 12, {}), skeleton) as held:
        yield held


@pytest.fixture(scope="module")
def theirs():
    folder = presets()["tightfit-demo"]
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_greedy_is_what_transformers_writes(demo, theirs):
    model, tokenizer = theirs
    tokens = tokenizer(TEXT, return_tensors="pt")
    output = model.generate(**tokens, max_new_tokens=NEW_TOKENS, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    report = generate(demo, encode(demo.skeleton, TEXT))
    assert report.text == tokenizer.decode(output, skip_special_tokens=True)
    assert report.tokens == len(output)


def test_a_seed_repeats_its_text(demo):
    prompt = encode(demo.skeleton, TEXT)
    texts = [generate(demo, prompt, Sampling(temperature=1.5, seed=seed)).text for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]


def test_the_likeliest_of_one_is_greedy(demo):
    prompt = encode(demo.skeleton, TEXT)
    assert generate(demo, prompt, Sampling(temperature=1.0, top_k=1)).text == generate(demo, prompt).text


def test_pieces_make_up_the_text(demo):
    pieces = []
    report = generate(demo, encode(demo.skeleton, TEXT), Sampling(ignore_eos=True), pieces.append)
    assert "".join(pieces) == report.text
    assert len([piece for piece in pieces if piece]) > 2
    assert report.tokens == NEW_TOKENS and report.complete


def test_a_stop_text_ends_the_answer(demo):
    prompt = encode(demo.skeleton, TEXT)
    whole = generate(demo, prompt, Sampling(ignore_eos=True)).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    stopped = generate(demo, prompt, Sampling(ignore_eos=True, stop=(stop,)))
    assert whole.startswith(stopped.text.rstrip()) and stop in stopped.text
    assert stopped.tokens < NEW_TOKENS and not stopped.complete


def test_stop_tokens_are_those_beside_the_weights(saved, tmp_path):
    """`generation_config.json` may name more of them than `config.json` (Llama 3, Qwen 3)."""
    folder = shutil.copytree(saved("llama"), tmp_path / "llama")
    (folder / "generation_config.json").unlink(missing_ok=True)
    prompt = Prompt(torch.arange(3, 11)[None])

    def tokens():
        skeleton = describe(str(folder))
        with build(Plan.all_resident(str(folder), Workload("generate", 1, 8, 12), 4, {}), skeleton) as held:
            report = generate(held, prompt)
            return [int(token) for token in report.text.split()]

    whole = tokens()
    assert len(whole) == 12
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [383, whole[4]]}))
    assert tokens() == whole[: whole.index(whole[4]) + 1]


@pytest.mark.parametrize("stop", ["", "x"])
def test_a_stop_text_that_cannot_work_is_refused(demo, stop):
    with pytest.raises(TightfitError, match="stop text"):
        generate(demo, Prompt(torch.tensor([[5, 6]])), Sampling(stop=(stop,)))
