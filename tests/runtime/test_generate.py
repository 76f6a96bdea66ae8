"""Generate: sampling, stop tokens and texts, pieces as they are sure; held against Hugging Face `generate` on the same model."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

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
    workload = Workload("generate", 1, encode(skeleton, TEXT).length, NEW_TOKENS)
    with build(Plan.all_resident("tightfit-demo", workload, 12, {}), skeleton) as held:
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


IDS = torch.arange(3, 11)[None]


@pytest.fixture
def configured(saved, tmp_path):
    """A saved family whose generation config says these words (None: there is no such file), and `config.json` those others."""

    def make(family, generation=None, **model):
        folder = shutil.copytree(saved(family), tmp_path / family, dirs_exist_ok=True)
        (folder / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        config = json.loads((saved(family) / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | model))
        return folder

    return make


def written(folder, *samplings, new_tokens=12):
    """The token ids after `IDS` for each of `samplings`, by one built model."""
    skeleton = describe(str(folder))
    plan = Plan.all_resident(str(folder), Workload("generate", 1, 8, new_tokens), len(skeleton.block_bytes()), {})
    with build(plan, skeleton) as held:
        reports = [generate(held, Prompt(IDS), sampling) for sampling in samplings or [Sampling()]]
    found = [[int(token) for token in report.text.split()] for report in reports]
    assert [report.tokens for report in reports] == [len(tokens) for tokens in found]
    return found if samplings else found[0]


def test_stop_tokens_are_those_beside_the_weights(configured):
    """`generation_config.json` may name more of them than `config.json` (Llama 3, Qwen 3)."""
    whole = written(configured("llama"))
    assert len(whole) == 12
    assert written(configured("llama", {"eos_token_id": [383, whole[4]]})) == whole[: whole.index(whole[4]) + 1]


@pytest.mark.parametrize("beside", [True, False])
def test_a_stop_token_can_be_ignored_wherever_it_is_named(beside, configured):
    """Greedy surely draws it as the fifth token. What was ignored once counts again the next time."""
    whole = written(configured("llama"))
    ends = {"eos_token_id": whole[4]}
    folder = configured("llama", ends if beside else None, **ends)
    stopped, ignored, again = written(folder, Sampling(), Sampling(ignore_eos=True), Sampling())
    assert ignored == whole
    assert stopped == again == whole[: whole.index(whole[4]) + 1] != whole


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("beside", [True, False])
def test_the_models_generation_config_holds(family, beside, configured):
    """What it suppresses, forces and penalizes. Greedy though it samples, and one beam though it names three, as the plan foresees."""
    plain = written(configured(family))
    words = {"suppress_tokens": plain[:2], "repetition_penalty": 1.7, "forced_bos_token_id": 7, "decoder_start_token_id": 0}
    folder = configured(family, words | {"do_sample": True, "top_k": 5, "min_p": 0.1, "num_beams": 3, "max_length": 9} if beside else None)
    if not beside:
        folder = configured(family, **words)  # where older models keep it
    theirs = {"llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}[family].from_pretrained(folder).eval()
    start = 1 if family == "t5" else IDS.shape[1]
    expected = [
        theirs.generate(IDS, max_new_tokens=12, do_sample=False, num_beams=1, repetition_penalty=penalty)[0, start:].tolist()
        for penalty in (1.7, 1.0)
    ]
    assert written(folder, Sampling(), Sampling(repetition_penalty=1.0)) == expected
    assert expected[0] != expected[1] and not set(plain[:2]) & set(expected[0]) and (expected[0][0] == 7) == (family == "t5")


def test_an_answer_that_is_not_finite_is_told(saved):
    skeleton = describe(str(saved("llama")))
    with build(Plan.all_resident("llama", Workload("generate", 1, 8, 4), 4, {}), skeleton) as held:
        held.model.lm_head.weight.data[5] = float("nan")
        with pytest.raises(TightfitError, match="not finite") as caught:
            generate(held, Prompt(IDS))
        assert "damaged" in caught.value.hint


@pytest.mark.parametrize("stop", ["", "x"])
def test_a_stop_text_that_cannot_work_is_refused(demo, stop):
    with pytest.raises(TightfitError, match="stop text"):
        generate(demo, Prompt(torch.tensor([[5, 6]])), Sampling(stop=(stop,)))
