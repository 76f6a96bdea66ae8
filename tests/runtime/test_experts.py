"""Experts: solved as a plain loop over masks does it, nearer to the dense ones than blind rounding, wherever tokens go and states rest."""

import copy

import pytest
import torch
import transformers
from families import CONFIGS, make
from torch import nn
from transformers import GptOssConfig, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import tightfit
from tightfit import catalog
from tightfit.describe.blocks import blocks_of
from tightfit.describe.source import describe
from tightfit.formats.affine import AffineCodec
from tightfit.formats.experts import QuantizedExperts
from tightfit.formats.linear import replace
from tightfit.runtime import calibrate
from tightfit.runtime import experts as room
from tightfit.runtime.calibrate import Call, Door, Walk
from tightfit.runtime.experts import Routed, routed_of, solve_experts
from tightfit.runtime.quantize import UNFINISHED, Job, quantize
from tightfit.techniques.gptq import GPTQ
from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError
from tightfit.verbs.quantizing import plan_quantize

SAMPLES = torch.randint(1, 384, (6, 24), generator=torch.Generator().manual_seed(5))
ROWS = 2
TECHNIQUES = ["gptq:bits=3,group=32", "lean:bits=2,rounds=1,spread=false"]


@pytest.fixture(autouse=True)
def aims_at_few_tokens(monkeypatch):
    """The samples here are short."""
    monkeypatch.setattr(calibrate, "TOKENS_PER_COLUMN", 0)


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """The folder of a family's tiny model in float32, made once."""
    root = tmp_path_factory.mktemp("sharp")

    def folder(family):
        if not (root / family).exists():
            make(family, torch.float32).save_pretrained(root / family)
        return root / family

    return folder


def job(folder, technique, **settings):
    name, given = catalog.parse(technique)
    return Job(describe(str(folder), "embed"), catalog.make(name, given), SAMPLES, ROWS, torch.device("cpu"), **settings)


def loaded(folder, family):
    return getattr(transformers, CONFIGS[family][0]).from_pretrained(folder).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=SAMPLES[:2]).logits


def off(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def called(model, path):
    """What a module is called with for all samples.  # → each of its inputs, (tokens, …)"""
    calls = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: calls.append(args))
    for some in SAMPLES.split(ROWS):
        with torch.no_grad():
            model(input_ids=some)
    hook.remove()
    return [torch.cat([each.flatten(0, -2) for each in part]) for part in zip(*calls, strict=True)]


def products(x, y):
    return 2 * x.t() @ x / len(x), 2 * y.t() @ x / len(x)


def gated(x, matrix):
    gate, up = (x @ matrix.t()).chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def solve_in_a_loop(experts, quantized, solver, hidden, index, dense_hidden):
    """Expert by expert over masks, with both matrices' inputs computed in the open."""
    for expert in range(quantized.num_experts):
        chose = (index == expert).any(dim=1)
        x, y = hidden[chose], dense_hidden[chose]
        first, second = experts.gate_up_proj[expert].detach(), experts.down_proj[expert].detach()
        quantized.keep_expert("gate_up_proj", expert, solver.solve(first, *products(x, y)))
        inner = gated(x, quantized.dequantize("gate_up_proj", expert))
        quantized.keep_expert("down_proj", expert, solver.solve(second, *products(inner, gated(y, first))))


def by_a_plain_loop(folder, family, technique, target):
    """Quantize a live model with the layers of `target`: after each group everything runs anew, and hooks gather inputs, dense ones too."""
    dense, model, (name, given) = loaded(folder, family), loaded(folder, family), catalog.parse(technique)
    solver = catalog.make(name, given)
    for path, block in blocks_of(model):
        for layers in (["q_proj", "k_proj", "v_proj"], ["o_proj"]):
            x, y = (called(each, f"{path}.self_attn.{layers[0]}")[0] for each in (model, dense))
            for layer in layers:
                quantized = target.get_submodule(f"{path}.self_attn.{layer}")
                quantized.keep(solver.solve(block.get_submodule(f"self_attn.{layer}").weight.detach(), *products(x, y)))
                replace(block, f"self_attn.{layer}", quantized)
        (hidden, index, _), (dense_hidden, *_) = (called(each, f"{path}.mlp.experts") for each in (model, dense))
        quantized = target.get_submodule(f"{path}.mlp.experts")
        solve_in_a_loop(block.mlp.experts, quantized, solver, hidden, index, dense_hidden)
        replace(block, "mlp.experts", quantized)
    return model


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_as_a_plain_loop_does_it_and_nearer_than_blind_rounding(family, technique, sharp, tmp_path):
    quantize(job(sharp(family), technique), tmp_path / "out")
    solved, dense = loaded(tmp_path / "out", family), loaded(sharp(family), family)
    rounded = tightfit.apply(loaded(sharp(family), family), [technique])
    expected = by_a_plain_loop(sharp(family), family, technique, copy.deepcopy(rounded))
    assert off(logits(solved), logits(expected)) < 0.05  # sums in another order; a code at a tie moves others
    assert off(logits(rounded), logits(expected)) > 0.2
    for path, _ in blocks_of(solved):
        given = called(solved, f"{path}.mlp.experts")
        with torch.no_grad():
            theirs, ours, blind = (model.get_submodule(f"{path}.mlp.experts")(*given) for model in (dense, solved, rounded))
        assert off(ours, theirs) < 0.75 * off(blind, theirs)  # 0.44 to 0.65 times were seen


KINDS = {
    "transposed, biases, own gate": lambda: GptOssExperts(GptOssConfig(hidden_size=64, intermediate_size=96, num_local_experts=3)),
    "no gate": lambda: NemotronHExperts(NemotronHConfig(hidden_size=64, moe_intermediate_size=96, n_routed_experts=3)),
}


def experts_of(kind, dtype=torch.float32):
    """transformers' module with random weights, and the module of few bits on meta."""
    torch.manual_seed(0)
    dense = KINDS[kind]()
    dense.config._experts_implementation = "eager"
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.3)
    return dense.to(dtype).requires_grad_(False), QuantizedExperts(dense.to(dtype), AffineCodec(3))


def routed(tokens=80, experts=3):
    """Correlated inputs, as real ones are, each with two experts of `experts`."""
    torch.manual_seed(1)
    index = torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)])
    return Routed(torch.randn(tokens, 64) @ torch.randn(64, 64), index.to(torch.int16), None), torch.rand(tokens, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_experts_is_solved_for_what_it_computes(kind, monkeypatch):
    monkeypatch.setattr(room, "TOKENS", 7)
    (dense, layer), (tokens, weights), told = experts_of(kind), routed(), []
    solve_experts(GPTQ(bits=3), "mlp.experts", dense, layer, tokens, told.append)
    first, second = layer.matrices
    assert told == [f"mlp.experts[{expert}].{name}" for expert in range(3) for name in (first, second)]
    for expert in range(3):
        x = tokens.hidden[(tokens.choices == expert).any(dim=1)]
        weight = dense.get_parameter(first)[expert].t() if layer.is_transposed else dense.get_parameter(first)[expert]
        bias = dense.get_parameter(f"{first}_bias")[expert] if layer.has_bias else 0
        product = x @ layer.dequantize(first, expert).t() + bias
        inner = dense._apply_gate(product) if layer.has_gate else dense.act_fn(product)
        below = dense.get_parameter(second)[expert].t() if layer.is_transposed else dense.get_parameter(second)[expert]
        for name, matrix, fed in ((first, weight, x), (second, below, inner)):
            expected = layer.codec.decode(
                GPTQ(bits=3).solve(matrix.contiguous(), 2 * fed.t() @ fed / len(fed)), matrix.shape, 0, len(matrix), x.dtype
            )
            assert off(layer.dequantize(name, expert) @ fed.t(), expected @ fed.t()) < 0.02
    blind = QuantizedExperts(dense, AffineCodec(3))
    for name, parameter in dense.named_parameters():
        blind.absorb(name, parameter)
    theirs, ours, rounded = (module(tokens.hidden, tokens.choices.long(), weights) for module in (dense, layer, blind))
    assert off(ours, theirs) < 0.75 * off(rounded, theirs)


def test_an_expert_that_no_token_reaches_is_rounded_and_counted():
    (dense, layer), (tokens, _) = experts_of("transposed, biases, own gate"), routed(experts=2)
    assert solve_experts(GPTQ(bits=3), "mlp.experts", dense, layer, tokens, lambda path: None) == 1
    blind = QuantizedExperts(dense, AffineCodec(3))
    for name, parameter in dense.named_parameters():
        blind.absorb(name, parameter)
    same = [
        torch.equal(mine[expert], its[expert]) for expert in range(3) for mine, its in zip(layer.stored[:1], blind.stored[:1], strict=True)
    ]
    assert same == [False, False, True]
    assert all(torch.equal(mine[2], its[2]) for mine, its in zip(layer.stored, blind.stored, strict=True))


@pytest.mark.parametrize(("reached", "where"), [(True, 1), (False, 2)])
def test_an_error_says_which_matrix_of_which_expert(reached, where):
    (dense, layer), (tokens, _) = experts_of("no gate"), routed(experts=3 if reached else 2)
    dense.down_proj.data[where, 0, 0] = float("nan")
    with pytest.raises(TightfitError, match=rf"`mlp.experts\[{where}\].down_proj`: .*weight holds NaN"):
        solve_experts(GPTQ(bits=3), "mlp.experts", dense, layer, tokens, lambda path: None)


class Block(nn.Module):
    """Calls its experts by keywords, with all tokens or without the first."""

    def __init__(self, skipped):
        super().__init__()
        self.experts, self.skipped = nn.Identity(), skipped
        self.experts.forward = lambda **given: given["hidden_states"]

    def forward(self, hidden):
        flat = hidden.flatten(0, 1)[self.skipped :]
        return self.experts(top_k_weights=flat[:, :2], top_k_index=flat[:, :2].long(), hidden_states=flat)


@pytest.mark.parametrize("skipped", [0, 1])
def test_experts_called_by_keywords_are_heard_and_with_few_tokens_they_are_not(skipped, tmp_path):
    states = torch.arange(6 * 24 * 4.0).view(6, 24, 4)
    walk = Walk(nn.Identity(), [], SAMPLES, ROWS, torch.device("cpu"), tmp_path / "states.bin")
    found = routed_of(walk, "experts", Door(Block(skipped), states, Call((), {})), Door(Block(0), states + 0.5, Call((), {})))
    assert not list(tmp_path.iterdir())
    if skipped:
        assert found is None
    else:
        assert torch.equal(found.hidden, states.flatten(0, 1)) and torch.equal(found.dense, found.hidden + 0.5)
        assert torch.equal(found.choices.long(), found.hidden[:, :2].long())


def test_states_on_the_disk_and_a_run_that_was_stopped_change_no_byte(sharp, tmp_path):
    counts = []
    quantize(
        job(sharp("mixtral"), "lean:bits=2,rounds=0,spread=false", progress=lambda done, whole, layer: counts.append((done, whole))),
        tmp_path / "whole",
    )
    assert counts == [(done, 48) for done in range(1, 49)]  # 4 blocks of 4 linear layers, and 4 experts of 2 matrices

    def stop(done, whole, layer):
        if layer == "model.layers.2.mlp.experts[1].down_proj":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(job(sharp("mixtral"), "lean:bits=2,rounds=0,spread=false", progress=stop, on_disk=True), tmp_path / "out")
    assert {file.name for file in (tmp_path / f"out{UNFINISHED}").glob("*.bin")} == {"states.bin", "dense-states.bin"}
    quantize(job(sharp("mixtral"), "lean:bits=2,rounds=0,spread=false", on_disk=True), tmp_path / "out", resume=True)
    files = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(("technique", "times"), [("rtn", 0), ("gptq", 2), ("lean", 4)])
def test_the_plan_counts_matrices_and_the_tokens_at_the_experts_door(technique, times, saved):
    def planned(ram):
        return plan_quantize(str(saved("mixtral")), SAMPLES.repeat(1000, 1), technique, {"bits": 3}, Budget.parse(None, f"{ram}B", None))

    roomy = planned(8 << 30)
    assert (roomy.layers, roomy.states_on) == (48, "ram")
    if times:
        short = planned(roomy.predicted_bytes - 1)
        assert short.states_on == "disk"
        assert roomy.predicted["activations"] - short.predicted["activations"] == times * 1000 * SAMPLES.numel() * 64 * 2
