"""Law 2: what was applied runs, with finite numbers near the plain model, for every technique on every family."""

import pytest
import torch
from families import CONFIGS, ids, make

import tightfit
from tightfit import catalog, steps
from tightfit.describe.blocks import blocks_of
from tightfit.describe.source import describe
from tightfit.rehearse.fake import inputs_for
from tightfit.runtime.build import build
from tightfit.runtime.generate import Sampling, generate
from tightfit.runtime.tokens import Prompt
from tightfit.terms.errors import TightfitError
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload

NEAR = {"int8": 0.03, "nf4": 0.5, "rtn": 0.6, "gptq": 0.6, "lean": 0.25}
"""Largest relative error of the logits, in the Frobenius norm. Random weights are the worst case: nothing was learned to be robust."""

SETTINGS = {"offload": {"streamed": (1, 2)}, "side": {"reduction": 4}}
NOT_FOR = {("side", "t5")}
"""What a technique refuses in one line."""


def test_every_technique_is_walked_over():
    """A new technique must be given a bound here, or be exact."""
    inexact = {name for name, kind in catalog.techniques().items() if kind.quality != "exact"}
    assert inexact == set(NEAR)


def logits(model):
    with torch.no_grad():
        return model(**inputs_for(model, Workload("embed", 2, 40), ids)).logits.float()


@pytest.mark.parametrize("technique", NEAR)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_quantized_model_is_near_the_plain_one(family, technique):
    plain = make(family)
    expected = logits(plain)
    before = sum(parameter.numel() * parameter.element_size() for _, block in blocks_of(plain) for parameter in block.parameters())
    changed = tightfit.apply(plain, [technique])
    assert changed is plain
    found = logits(changed)
    assert torch.isfinite(found).all()
    error = ((found - expected).norm() / expected.norm()).item()
    assert 0 < error < NEAR[technique]
    after = sum(
        tensor.numel() * tensor.element_size() for _, block in blocks_of(changed) for tensor in [*block.parameters(), *block.buffers()]
    )
    assert after < 0.75 * before


def test_eight_bits_are_nearer_than_four():
    expected = logits(make("llama"))
    errors = {name: (logits(tightfit.apply(make("llama"), [name])) - expected).norm().item() for name in NEAR}
    assert errors["int8"] < 0.2 * min(errors["nf4"], errors["lean"])
    assert errors["lean"] < 0.7 * errors["rtn"]


@pytest.mark.parametrize("family", CONFIGS)
def test_recomputed_gradients_are_the_plain_ones(family):
    """Exact: the backward pass computes the same numbers from the same random state, dropout included."""

    def gradients(model):
        torch.manual_seed(7)
        loss = steps.loss_of(model.train(), inputs_for(model, Workload("tune", 2, 32), ids))
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None} | {
            "loss": loss.detach()
        }

    expected = gradients(make(family))
    found = gradients(tightfit.apply(make(family), ["recompute"]))
    assert found.keys() == expected.keys()
    assert len(found) > 10
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("technique", NEAR)
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert", "qwen3-moe"])
def test_gradients_flow_through_a_quantized_model(family, technique):
    """To what stays dense (embeddings, norms), near those of the plain model; the quantized weights are frozen."""

    def gradients(model):
        steps.loss_of(model, inputs_for(model, Workload("tune", 2, 32), ids)).backward()
        return {name: parameter.grad.float() for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain = gradients(make(family))
    changed = tightfit.apply(make(family), [technique])
    found = gradients(changed)
    assert found and found.keys() < plain.keys()
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    mine, other = (torch.cat([gradients[name].flatten() for name in found]) for gradients in (found, plain))
    assert torch.nn.functional.cosine_similarity(mine, other, dim=0) > (0.999 if technique == "int8" else 0.85)


@pytest.mark.parametrize("techniques", [["int8", "recompute"], ["nf4", "recompute"], ["lean:bits=3", "recompute"]])
def test_pairs_train(techniques):
    """The order in which they are named does not matter: each is applied in its stage."""
    losses = []
    for named in (techniques, techniques[::-1]):
        model = tightfit.apply(make("llama"), named).train()
        optimizer = steps.make_optimizer(model)
        batch = inputs_for(model, Workload("tune", 2, 32), ids)
        losses.append([steps.train_step(model, batch, optimizer).item() for _ in range(3)])
    assert losses[0] == losses[1]
    assert losses[0][2] < losses[0][0]


@pytest.mark.parametrize("technique", ["", *catalog.technique_names()])
@pytest.mark.parametrize("family", ["llama", "bloom", "t5", "qwen3-moe"])
def test_every_technique_writes(family, technique, saved):
    """Through the whole run: built from files, Hugging Face `generate`, and a report with the planned number of tokens."""
    skeleton = describe(str(saved(family)))
    techniques = {technique: SETTINGS.get(technique, {})} if technique else {}
    plan = Plan.all_resident(str(saved(family)), Workload("generate", 1, 12, 6), len(blocks_of(skeleton.meta_model())), techniques)
    if (technique, family) in NOT_FOR:
        with pytest.raises(TightfitError, match=f"`{technique}` cannot"):
            build(plan, skeleton)
        return
    with build(plan, skeleton) as held:
        report = generate(held, Prompt(ids((1, 12), 384)), Sampling(ignore_eos=True))
    assert report.tokens == 6
    assert report.complete
    assert report.measured_bytes > sum(skeleton.block_bytes()) * 0.1
    assert 0 < report.seconds["per_token"] <= report.seconds["whole"]
    assert (report.moved_bytes > 0) == (technique == "offload")


def test_streams_refuse_to_run_without_a_ring():
    model = tightfit.apply(make("llama"), {"offload": {"streamed": (1,)}})
    with pytest.raises(TightfitError, match="nothing brings its weights"):
        logits(model)
