"""Evaluate: perplexity against plain cross-entropies of the same model, window by window, and the bytes that scoring holds."""

import math

import pytest
import torch
from families import ids, make
from torch.nn.functional import cross_entropy, log_softmax

from tightfit.describe.source import describe
from tightfit.rehearse.allocator import allocator_peak
from tightfit.runtime import evaluate
from tightfit.runtime.build import build
from tightfit.runtime.evaluate import check_scorable, perplexity
from tightfit.terms.errors import TightfitError
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload


@pytest.fixture(scope="module")
def held(saved):
    """A tiny Llama with 256 positions, planned for windows of 16 tokens."""
    skeleton = describe(str(saved("llama")))
    with build(Plan.all_resident(str(saved("llama")), Workload("embed", 1, 16), 4, {}), skeleton) as built:
        yield built


def score(held, text, window, text_bytes=100):
    return perplexity(held, text, text_bytes, window, lambda done, whole: None)


@pytest.mark.parametrize("window", [1, 2, 16, 39, 40, 200])
def test_every_token_but_the_first_is_scored_once(window, held):
    """Token by token: the reference reads, for each, what stands before it since the last multiple of the window."""
    text, model = ids((1, 40), 384), make("llama")
    expected = 0.0
    with torch.no_grad():
        for place in range(1, 40):
            start = (place - 1) // window * window
            logits = model(input_ids=text[:, start:place]).logits[0, -1]
            expected -= log_softmax(logits.double(), dim=0)[text[0, place]].item()
    found = score(held, text, window, text_bytes=57)
    assert found.tokens == 39
    assert math.log(found.perplexity) == pytest.approx(expected / 39, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / 57, rel=1e-5)


def test_progress_ends_with_the_text(held):
    told = []
    perplexity(held, ids((1, 40), 384), 1, 16, lambda done, whole: told.append((done, whole)))
    assert told == [(16, 39), (32, 39), (39, 39)]


@pytest.mark.parametrize(("tokens", "complete"), [(40, True), (17, True), (16, False)])
def test_a_text_of_one_window_is_what_was_planned(tokens, complete, held):
    assert score(held, ids((1, tokens), 384), 16).report.complete == complete


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_the_logits_stay_under_their_bytes(dtype, monkeypatch):
    monkeypatch.setattr(evaluate, "LOSS_BYTES", 1 << 20)
    logits, targets = torch.randn(100, 5000).to(dtype), ids((100,), 5000)
    losses = []
    peak = allocator_peak(lambda: losses.append(evaluate._summed_loss(logits, targets)))
    assert 0.4 * (1 << 20) < peak < 1.02 * (1 << 20)
    assert losses[0] == pytest.approx(cross_entropy(logits.double(), targets, reduction="sum").item(), rel=1e-5)


def test_one_row_is_scored_however_many_words_there_are(monkeypatch):
    monkeypatch.setattr(evaluate, "LOSS_BYTES", 8)
    logits, targets = torch.randn(3, 50), ids((3,), 50)
    assert evaluate._summed_loss(logits, targets) == pytest.approx(cross_entropy(logits, targets, reduction="sum").item())


def test_the_logits_of_a_window_do_not_outlive_it(held):
    """More windows hold no more than one."""
    one, four = (allocator_peak(lambda tokens=tokens: score(held, ids((1, tokens), 384), 64)) for tokens in (65, 257))
    assert four < one + 64 * 384 * 4 / 2


def test_encoder_decoder_models_are_refused(saved):
    skeleton = describe(str(saved("t5")))
    with pytest.raises(TightfitError, match=r"decoder-only \(causal\) model, and `t5` is an encoder–decoder") as caught:
        check_scorable(skeleton.config, 100, 16)
    assert caught.value.hint
    with build(Plan.all_resident(str(saved("t5")), Workload("embed", 1, 16), 8, {}), skeleton) as built, pytest.raises(TightfitError):
        score(built, ids((1, 40), 384), 16)


def test_windows_are_no_longer_than_the_model(held):
    with pytest.raises(TightfitError, match="a sequence has 257 tokens, more than the model's 256 positions") as caught:
        score(held, ids((1, 300), 384), 257)
    assert "--context 256" in caught.value.hint
    assert score(held, ids((1, 257), 384), 5000).tokens == 256  # it fits whole


def test_a_single_token_predicts_nothing(held):
    with pytest.raises(TightfitError, match="single token"):
        score(held, torch.tensor([[5]]), 16)
