"""Side: real transformers models with a side network beside them, against the paper's formulas written out in plain PyTorch."""

import copy
import math

import pytest
import torch
from families import ids, make
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
)
from transformers.cache_utils import DynamicCache, StaticCache

from tightfit.describe.blocks import block_lists
from tightfit.describe.skeleton import meta_copy
from tightfit.formats.image import image_of, unbind, write_image
from tightfit.formats.linear import QuantizedLinear
from tightfit.rehearse.allocator import allocator_peak
from tightfit.rehearse.rehearsal import rehearse, rehearse_whole
from tightfit.runtime.stream import Stream
from tightfit.steps import make_optimizer, train_step
from tightfit.techniques.int8 import Int8
from tightfit.techniques.nf4 import NF4
from tightfit.techniques.offload import Offload
from tightfit.techniques.recompute import Recompute
from tightfit.techniques.side import DOWNSAMPLES, Side, activate, trained_head
from tightfit.terms.errors import TightfitError
from tightfit.terms.workload import Workload

FAMILIES = ["llama", "qwen3", "gpt-neox", "opt", "bloom", "gpt2", "gptj", "bert", "mixtral"]


def beside(family: str = "llama", dtype: torch.dtype = torch.float32, mix: float = 1.0, **settings: object) -> nn.Module:
    """A tiny model with a side network, whose gates lean and which says something."""
    model = make(family, dtype)
    Side(**{"reduction": 4, **settings}).apply(model)
    lean(model, mix)
    return model


def lean(model: nn.Module, mix: float, name: str = "default") -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.side[name].parameters():
            if parameter.dim() > 0:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        model.side[name].alpha.fill_(mix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tuning_starts_exactly_at_the_model_and_the_mix_learns_first(family, dtype):
    tokens, model = ids((2, 9), 384), make(family, dtype)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    paths = {name: id(parameter) for name, parameter in model.named_parameters()}
    Side(reduction=4).apply(model)
    lean(model, 1.0)
    output = model.train()(input_ids=tokens, labels=tokens)
    assert torch.equal(output.logits, expected)
    output.loss.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert moved == {"side.default.alpha"}
    assert {name: id(parameter) for name, parameter in model.named_parameters() if not name.startswith("side.")} == paths


@pytest.mark.parametrize("family", FAMILIES)
def test_once_it_leans_every_part_of_the_side_learns_and_the_base_never_does(family):
    model, tokens = beside(family, mix=0.5), ids((2, 9), 384)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == name.startswith("side."), name


COPY = {"reduction": 1, "downsample": "linear", "init": "base"}


@pytest.mark.parametrize("under", [None, NF4(), Int8()], ids=["dense", "nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt-neox", "opt", "bloom", "gpt2", "gptj", "bert"])
def test_from_the_base_it_is_the_base_once_more(family, under):
    """A gate that lets nothing in and no base in the sum leave the side alone, from the embedding on: a base of the decoded weights."""
    model, decoded, tokens = make(family), make(family), ids((2, 9), 384)
    if under:
        under.apply(model)
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                dense = module.dequantize()
                decoded.get_submodule(path).weight.copy_(dense.T if module.transposed else dense)
        expected, before = decoded(input_ids=tokens).logits, model(input_ids=tokens).logits
        Side(**COPY).apply(model)
        assert torch.equal(model(input_ids=tokens).logits, before)
        side = model.side.default
        side.gamma.fill_(100.0), side.alpha.zero_()
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
        side.blocks[1].load_state_dict({name: torch.zeros_like(tensor) for name, tensor in side.blocks[1].state_dict().items()})
        assert not torch.allclose(model(input_ids=tokens).logits, expected, rtol=1e-3, atol=1e-3)


def test_from_the_base_copies_no_storage():
    model = make("mixtral")
    Side(**COPY).apply(model)
    inside = {parameter.data_ptr() for parameter in model.side.parameters()}
    assert not inside & {parameter.data_ptr() for parameter in model.model.parameters()}
    experts = model.model.layers[2].state_dict()
    assert experts and all(torch.equal(tensor, experts[name]) for name, tensor in model.side.default.blocks[2].state_dict().items())


@pytest.mark.parametrize("under", [None, NF4(), Int8()], ids=["dense", "nf4", "int8"])
@pytest.mark.parametrize("leave", [lambda block: block.to("meta"), lambda block: unbind(block, image_of(block))], ids=["meta", "streamed"])
def test_from_a_base_that_is_elsewhere_is_one_clear_line(leave, under):
    model = make("llama").requires_grad_(False)  # only frozen tensors stream
    if under:
        under.apply(model)
    leave(model.model.layers[2])
    with pytest.raises(TightfitError, match=r"cannot read `layers.2.self_attn.q_proj.weight` of the base") as fault:
        Side(**COPY).apply(model)
    assert "streams" in fault.value.hint


def rms_norm(x, weight):
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rotate(x, head):
    """Rotary embedding.  # (batch, heads, tokens, head)"""
    frequencies = 10000.0 ** (-torch.arange(0, head, 2) / head)
    angles = torch.arange(x.shape[2])[:, None] * frequencies
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1)


def llama_block(x, weights, at, heads, kv_heads):
    def linear(name, value):
        return value @ weights[f"layers.{at}.{name}.weight"].T

    batch, tokens, width = x.shape
    head = width // heads
    normed = rms_norm(x, weights[f"layers.{at}.input_layernorm.weight"])
    q, k, v = (
        linear(f"self_attn.{name}_proj", normed).view(batch, tokens, count, head).transpose(1, 2)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    q, k, v = rotate(q, head), rotate(k, head).repeat_interleave(heads // kv_heads, 1), v.repeat_interleave(heads // kv_heads, 1)
    scores = q @ k.mT / math.sqrt(head) + torch.full((tokens, tokens), -math.inf).triu(1)
    x = x + linear("self_attn.o_proj", (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width))
    normed = rms_norm(x, weights[f"layers.{at}.post_attention_layernorm.weight"])
    return x + linear("mlp.down_proj", F.silu(linear("mlp.gate_proj", normed)) * linear("mlp.up_proj", normed))


def downsampled(kind, weights, at, x):
    if kind.endswith("pool"):
        windows = x.unflatten(-1, (-1, 4))
        return windows.amax(-1) if kind == "max_pool" else windows.mean(-1)
    if kind == "linear":
        return x @ weights[f"down.{at}.weight"].T
    inner = x @ weights[f"down.{at}.0.weight"].T
    if kind == "lora":
        return inner @ weights[f"down.{at}.1.weight"].T
    outer = F.silu(inner) @ weights[f"down.{at}.2.weight"].T
    return F.layer_norm(outer, outer.shape[-1:], weights[f"down.{at}.3.weight"], weights[f"down.{at}.3.bias"])


@pytest.mark.parametrize("kind", DOWNSAMPLES)
def test_the_paper_s_formulas_in_plain_pytorch(kind):
    model, tokens = beside(mix=0.7, downsample=kind), ids((2, 9), 384)
    model(input_ids=tokens, labels=tokens).loss.backward()
    base = {name: parameter.detach() for name, parameter in model.model.named_parameters()}
    side = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.side.default.named_parameters()}
    network = {name.removeprefix("network."): parameter for name, parameter in side.items()}
    h = base["embed_tokens.weight"][tokens]
    g = downsampled(kind, side, 0, h)
    for at in range(4):
        h = llama_block(h, base, at, 4, 2)
        gate = 1 / (1 + torch.exp(-side["gamma"][at]))
        g = llama_block((1 - gate) * downsampled(kind, side, at, h) + gate * g, network, at, 4, 2)
    added = rms_norm(g, side["network.norm.weight"]) @ side["up.weight"].T + side["up.bias"]
    mixed = side["alpha"] * rms_norm(h, base["norm.weight"]) + (1 - side["alpha"]) * added
    logits = mixed @ model.lm_head.weight.detach().T
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.testing.assert_close(model(input_ids=tokens).logits, logits, rtol=1e-4, atol=1e-5)
    for name, parameter in model.side.default.named_parameters():
        torch.testing.assert_close(parameter.grad, side[name].grad, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("kind", "millions", "share"),
    [("adapter", 28.61, 7.85), ("lora", 28.59, 7.79), ("linear", 59.92, 56.00), ("max_pool", 26.37, 0.0), ("avg_pool", 26.37, 0.0)],
)
def test_trained_parameters_of_llama_2_7b_are_the_paper_s(kind, millions, share):
    """Paper, table of downsamplers: 0.41, 0.41, 0.85, 0.38, 0.38 % of 7 B, of which D 7.8, 7.8, 56.0, 0, 0 %."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    Side(downsample=kind).apply(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    down = sum(parameter.numel() for parameter in model.side.default.down.parameters())
    assert (round(trained / 1e6, 2), round(100 * down / trained, 2)) == (millions, share)
    assert {parameter.dtype for parameter in model.side.parameters()} == {torch.float32}


def test_a_side_on_meta_is_filled_later_and_then_runs():
    model = make("llama")
    with torch.device("meta"):
        blank = meta_copy(model)
    technique = Side(reduction=4)
    technique.apply(blank)
    assert all(tensor.is_meta for tensor in [*blank.side.parameters(), *blank.side.buffers()])
    blank.model.embed_tokens.weight = model.model.embed_tokens.weight
    technique.initialise(blank)
    side = blank.side.default
    assert not any(tensor.is_meta for tensor in [*side.parameters(), *side.buffers()])
    assert side.alpha == 1 and not side.gamma.any() and torch.equal(side.network.norm.weight, torch.ones(16))
    assert 0.01 < side.network.layers[0].mlp.up_proj.weight.std() < 0.03
    frequencies = side.network.rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, 10000.0 ** (-torch.arange(0, 4, 2) / 4))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt-neox", "opt", "bloom", "gpt2"])
def test_generating_with_caches_is_generating_without(family):
    model, tokens = beside(family, mix=-3.0), ids((3, 7), 384)
    padded = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]]), "pad_token_id": 0}
    length = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    greedy = model.generate(tokens, **padded, **length)
    assert torch.equal(greedy, model.generate(tokens, **padded, **length, use_cache=False))
    beams = model.generate(tokens, **padded, **length, num_beams=3)
    assert torch.equal(beams, model.generate(tokens, **padded, **length, num_beams=3, use_cache=False))
    activate(model, None)
    assert not torch.equal(greedy, model.generate(tokens, **padded, **length))


def test_a_cropped_cache_goes_on_where_it_was_cut():
    model, tokens, cache = beside(mix=-3.0), ids((1, 12), 384), DynamicCache()
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        model(input_ids=tokens[:, :9], past_key_values=cache, use_cache=True)
        cache.crop(-4)
        rest = model(input_ids=tokens[:, 5:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 5:], rtol=1e-4, atol=1e-5)


def test_caches_that_a_side_cannot_share_are_refused():
    model, tokens, cache = beside(), ids((1, 5), 384), DynamicCache()
    activate(model, None)
    model(input_ids=tokens, past_key_values=cache, use_cache=True)
    activate(model, "default")
    with pytest.raises(TightfitError, match="filled without the side network `default`"):
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
    with pytest.raises(TightfitError, match="cannot write into a `StaticCache`"):
        model(input_ids=tokens, past_key_values=StaticCache(model.config, max_cache_len=8), use_cache=True)


def kept_of_width(model: nn.Module, width: int) -> int:
    """How many different tensors of (2, 9, width) autograd keeps for the backward pass, whatever their shape is then."""
    kept, tokens = {}, ids((2, 9), 384)

    def keep(tensor):
        if tensor.numel() == 2 * 9 * width and not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    del loss
    return len(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "full"), [("adapter", 6), ("lora", 6), ("linear", 6), ("max_pool", 1), ("avg_pool", 1)])
def test_the_backward_pass_keeps_full_width_only_for_what_learns_from_it(kind, full, dtype):
    """One for the mix; one for the embedding and each of four blocks where a downsampler learns. None in another precision."""
    assert kept_of_width(beside("llama", dtype, mix=0.5, downsample=kind), 64) == full


@pytest.mark.parametrize(("base", "kind"), [(Int8(), "avg_pool"), (NF4(), "adapter")], ids=["int8", "nf4"])
def test_it_learns_beside_a_quantized_base_that_stays_as_it_is(base, kind):
    model, tokens = make("llama", torch.bfloat16), ids((2, 16), 384)
    base.apply(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(0)
    Side(reduction=4, downsample=kind).apply(model)
    model.train()
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.03)
    losses = [train_step(model, {"input_ids": tokens, "labels": tokens}, optimizer).item() for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], parameter) for name, parameter in before.items())


@pytest.mark.parametrize("config", [BertConfig, RobertaConfig, LlamaConfig], ids=["bert", "roberta", "llama"])
def test_a_classifier_is_trained_beside_the_side(config):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config(**sizes, pad_token_id=0), dtype=torch.bfloat16).eval()
    tokens, labels = ids((6, 8), 99), torch.tensor([0, 1, 1, 0, 1, 0])
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    Side(reduction=4).apply(model)
    assert torch.equal(model(input_ids=tokens).logits, expected)
    heads = {name for name, _ in trained_head(model)}
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == heads | {"side"} and heads in ({"classifier"}, {"score"})
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    losses = [train_step(model, {"input_ids": tokens, "labels": labels}, optimizer).item() for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    tokens = ids((2, 9), 384)
    model.train()(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "bert"])
def test_recompute_runs_the_side_twice_and_the_base_once(family, dtype):
    expected = gradients(beside(family, dtype, mix=0.5))
    model, runs = beside(family, dtype, mix=0.5), {}
    Recompute().apply(model)
    for path, block in ((f"{path}.{at}", block) for path, stack in block_lists(model) for at, block in enumerate(stack)):
        norm = next(module for module in block.modules() if "Norm" in type(module).__name__)
        norm.register_forward_hook(lambda *_, path=path: runs.__setitem__(path, runs.get(path, 0) + 1))
    found = gradients(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert {runs[path] for path in runs if path.startswith("side.")} == {2}
    assert {runs[path] for path in runs if not path.startswith("side.")} == {1}


def test_the_base_streams_through_the_forward_pass_only(tmp_path):
    expected = gradients(beside(mix=0.5))
    model = beside(mix=0.5)
    Offload((0, 1, 2, 3)).apply(model)
    blocks, images, end = model.stream_socket.blocks, {}, 0
    assert list(blocks.values()) == list(model.model.layers)
    with open(tmp_path / "spill", "w+b") as file:
        for position, block in blocks.items():
            images[position] = write_image(block, image_of(block), file, end)
            end += images[position].segments[0].length
    with Stream(blocks, images, 2, "cpu") as ring:
        visits, acquire = [], ring.acquire
        ring.acquire = lambda position: (visits.append(position), acquire(position))[1]
        model.stream_socket.ring = ring
        found = gradients(model)
    assert visits == [0, 1, 2, 3]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_first_side_block_takes_the_downsampled_embedding_itself():
    """Granite scales what it takes for an embedding, which the side's first block must not see."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
    torch.manual_seed(0)
    model, tokens, seen = AutoModelForCausalLM.from_config(GraniteConfig(**sizes, embedding_multiplier=3.0)).eval(), ids((2, 5), 99), []
    states = model(input_ids=tokens, output_hidden_states=True).hidden_states
    Side(reduction=4).apply(model)
    lean(model, 0.5)
    side = model.side.default
    side.network.layers[0].input_layernorm.register_forward_pre_hook(lambda _norm, args: seen.append(args[0]))
    model(input_ids=tokens)
    gate, first = side.gamma[0].sigmoid(), side.down["0"]
    torch.testing.assert_close(seen[0], (1 - gate) * first(states[1]) + gate * first(states[0]))


def test_several_sides_stand_beside_one_base():
    model, tokens = make("llama"), ids((2, 9), 384)
    with torch.no_grad():
        base = model(input_ids=tokens).logits
        Side(reduction=4, name="french").apply(model)
        lean(model, 0.5, "french")
        french = model(input_ids=tokens).logits
        Side(reduction=8, downsample="avg_pool", name="german").apply(model)
        lean(model, 0.5, "german")
        german = model(input_ids=tokens).logits
        assert not torch.equal(french, base) and not torch.equal(german, base) and not torch.equal(german, french)
        for name, expected in (("french", french), (None, base), ("german", german)):
            activate(model, name)
            assert torch.equal(model(input_ids=tokens).logits, expected)
    with pytest.raises(TightfitError, match="no side network is called `frensh`"):
        activate(model, "frensh")
    with pytest.raises(TightfitError, match="has a side network `french` already"):
        Side(reduction=4, name="french").apply(model)


def test_a_copy_is_a_model_of_its_own():
    model, tokens = beside(mix=0.5), ids((2, 9), 384)
    twin = copy.deepcopy(model)
    expected = model(input_ids=tokens).logits
    assert torch.equal(twin(input_ids=tokens).logits, expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(input_ids=tokens).logits, expected)


def test_base_blocks_are_never_dropped():
    """OPT leaves blocks out at random while training, and drops out hidden states."""
    plain = make("opt").config
    plain.layerdrop, plain.dropout = 0.9, 0.5
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(plain).eval()
    tokens = ids((2, 9), 384)
    expected = model(input_ids=tokens).logits
    Side(reduction=4).apply(model)
    model.train()
    assert torch.equal(model(input_ids=tokens).logits, expected)
    assert model.side.default.network.training


@pytest.mark.parametrize(
    ("family", "techniques"),
    [
        ("llama", [Side(4)]),
        ("llama", [Side(4), Recompute()]),
        ("opt", [NF4(), Side(4)]),
        ("bloom", [Side(4, "max_pool")]),
        ("bert", [Side(4, "avg_pool"), Recompute()]),
    ],
    ids=["llama", "llama-recompute", "opt-nf4", "bloom-pool", "bert-pool-recompute"],
)
def test_the_rehearsed_peak_is_the_measured_one(family, techniques):
    model, tokens = make(family), ids((2, 128), 384)
    paper = meta_copy(model)
    for technique in techniques:
        technique.apply(model)
    rests = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in [*model.parameters(), *model.buffers()]}

    def work() -> None:
        optimizer = make_optimizer(model.train())
        for _ in range(2):
            train_step(model, {"input_ids": tokens, "labels": tokens}, optimizer)

    measured = sum(rests.values()) + allocator_peak(work)
    assert rehearse_whole(paper, Workload("tune", 2, 128), techniques).peak_bytes == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("workload", [Workload("tune", 2, 64), Workload("generate", 2, 48, 16)], ids=["tune", "generate"])
def test_a_deep_model_is_rehearsed_by_a_few_blocks(workload):
    def deep() -> nn.Module:
        config = make("llama").config
        config.num_hidden_layers = 7
        with torch.device("meta"):
            return LlamaForCausalLM(config)

    assert rehearse(deep, workload, [Side(4)]).peak_bytes == rehearse_whole(deep(), workload, [Side(4)]).peak_bytes


@pytest.mark.parametrize(
    ("family", "settings", "line"),
    [
        ("llama", {"downsample": "adaptor"}, "no downsampler `adaptor`"),
        ("llama", {"rank": 0}, "`side:rank` is at least 1"),
        ("llama", {"reduction": 3}, "a width of 64 in 4 heads cannot be divided by 3"),
        ("llama", {"init": "basis"}, "`side:init` cannot be `basis`"),
        ("llama", {"init": "base"}, "copies blocks as wide as they are"),
        ("llama", {"name": "keys"}, "cannot be called `keys`"),
        ("t5", {}, "cannot stand beside `T5ForConditionalGeneration`"),
        ("vit", {}, "cannot stand beside `ViTForImageClassification`"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(family, settings, line):
    model = make(family)
    before = list(model.state_dict())
    with pytest.raises(TightfitError, match=line) as fault:
        Side(**{"reduction": 4, **settings}).apply(model)
    assert fault.value.hint
    assert list(model.state_dict()) == before and all(parameter.requires_grad for parameter in model.parameters())


def test_stacks_of_the_base_come_first():
    assert [path for path, _ in block_lists(beside())] == ["model.layers", "side.default.network.layers"]
