"""Law 3: streamed = resident, bit for bit: prompt, decoded tokens, gradients; from the model's own files and through the spill."""

from dataclasses import replace

import pytest
import torch
from families import CONFIGS, GENERATES, ids
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tightfit import steps
from tightfit.describe.blocks import blocks_of
from tightfit.describe.source import describe
from tightfit.planner.residency import resident
from tightfit.rehearse.fake import inputs_for
from tightfit.runtime.build import build
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload

NEW_TOKENS = 8


def planned(folder, room=None, slots=2, task="generate", random_weights=False, **techniques):
    """A plan that keeps `room` blocks resident (all when None) and streams the others from disk; and what it is a plan of."""
    skeleton = describe(str(folder), task, random_weights)
    count = len(blocks_of(skeleton.meta_model()))
    plan = replace(Plan.all_resident(str(folder), Workload(task, 1, 24, NEW_TOKENS), count, techniques), random_weights=random_weights)
    if room is not None:
        stays = resident(count, room)
        streamed = tuple(position for position in range(count) if position not in stays)
        homes = tuple("ram" if position in stays else "disk" for position in range(count))
        plan = replace(plan, residency=homes, techniques=techniques | {"offload": {"streamed": streamed, "slots": slots}})
    return plan, skeleton


def written(model, prompt):
    """The logits of the prompt's last position, then of every token that is decoded greedily, and the tokens."""
    rows, inputs, cache = [], {}, steps.new_cache(model)
    name, tokens = "input_ids", prompt
    with torch.inference_mode():
        if model.config.is_encoder_decoder:
            inputs["encoder_outputs"] = model.get_encoder()(input_ids=prompt)
            name, tokens = "decoder_input_ids", prompt[:, :1]
        for _ in range(1 + NEW_TOKENS):
            output = model(**{name: tokens}, past_key_values=cache, use_cache=True, **inputs)
            rows.append(output.logits[:, -1])
            tokens = steps.greedy_pick(output.logits)
    return torch.cat(rows)


def compare(folder, room, slots=2, **techniques):
    """Write with all blocks resident, then with some streamed; twice, since a second pass finds the slots as the first left them."""
    prompt = ids((2, 24), 384)
    with build(*planned(folder, **techniques)) as held:
        expected = [written(held.model, prompt), written(held.model, prompt.flip(1))]
    plan, skeleton = planned(folder, room, slots, **techniques)
    with build(plan, skeleton) as held:
        assert torch.isfinite(expected[0]).all() and not torch.equal(*expected)
        assert torch.equal(written(held.model, prompt), expected[0])
        assert torch.equal(written(held.model, prompt.flip(1)), expected[1])
        streamed = plan.techniques["offload"]["streamed"]
        assert held.stream.traffic().reads >= 2 * NEW_TOKENS * (len(streamed) - slots)
        return held


@pytest.mark.parametrize("family", GENERATES)
def test_from_the_models_files(family, saved):
    """Blocks as they are stored; fused experts come from the spill, since no file holds them joined."""
    compare(saved(family), room=1)


@pytest.mark.parametrize("room", [0, 2, 3])
def test_however_many_stay(room, saved):
    compare(saved("llama"), room=room)


def test_through_three_slots(saved):
    compare(saved("qwen3"), room=0, slots=3)


@pytest.mark.parametrize("technique", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["gpt2", "t5", "qwen3-moe"])
def test_quantized_through_the_spill(family, technique, saved):
    compare(saved(family), room=1, **{technique: {}})


def test_standard_nf4_through_the_spill(saved):
    compare(saved("llama"), room=1, nf4={"layout": "standard"})


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - set(GENERATES)))
def test_one_pass_of_an_encoder(family, saved):
    with build(*planned(saved(family), task="embed")) as held:
        batch = inputs_for(held.model, Workload("embed", 2, 24), ids)
        with torch.no_grad():
            expected = held.model(**batch).logits
    with build(*planned(saved(family), 1, task="embed")) as held, torch.no_grad():
        assert torch.equal(held.model(**batch).logits, expected)
        assert held.stream.traffic().reads >= 3


def test_random_weights_through_the_spill():
    prompt = ids((1, 12), 4096)
    with build(*planned("tightfit-demo", random_weights=True)) as held:
        expected = written(held.model, prompt)
    with build(*planned("tightfit-demo", room=3, random_weights=True)) as held:
        assert torch.equal(written(held.model, prompt), expected)


def gradients(model, batch):
    """Loss and gradients of a soft prompt in front of a frozen base, and of an adapter beside its last hidden state."""
    torch.manual_seed(4)
    embedding = model.get_input_embeddings()
    width, dtype = embedding.weight.shape[1], embedding.weight.dtype
    prompt = nn.Parameter(torch.randn(2, 5, width).mul_(0.1).to(dtype))  # (batch, soft tokens, width)
    down, up = nn.Linear(width, 4, bias=False).to(dtype), nn.Linear(4, width, bias=False).to(dtype)
    trainable = [prompt, *down.parameters(), *up.parameters()]
    losses = []
    for _ in range(2):
        embedded = torch.cat([prompt, embedding(batch)], dim=1)  # (batch, soft tokens + tokens, width)
        hidden = model.get_decoder()(inputs_embeds=embedded, use_cache=False).last_hidden_state
        hidden = hidden + up(down(hidden))
        scores = model.get_output_embeddings()(hidden[:, 5:-1]).float()
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        losses.append(loss.detach())
        with torch.no_grad():
            prompt -= 0.1 * prompt.grad  # so that the second step is another one
    return [*losses, *(parameter.grad for parameter in trainable)]


@pytest.mark.parametrize(
    ("family", "technique"), [("llama", ""), ("bloom", ""), ("qwen3-moe", ""), ("llama", "int8"), ("qwen3-moe", "nf4")]
)
def test_gradients_through_a_frozen_base(family, technique, saved):
    """`recompute` fetches each block's weights again for its backward pass; two steps, so four turns."""
    techniques = ({technique: {}} if technique else {}) | {"recompute": {}}
    batch = ids((2, 20), 384)
    with build(*planned(saved(family), **techniques)) as held:
        expected = gradients(held.model, batch)
    with build(*planned(saved(family), 1, **techniques)) as held:
        found = gradients(held.model, batch)
        assert held.stream.traffic().reads >= 3 + 3 * (3 - 2)  # each turn-round finds two of the three in the slots
    assert all(torch.isfinite(gradient).all() and gradient.abs().sum() > 0 for gradient in expected)
    assert len(found) == len(expected)
    assert [index for index, (mine, other) in enumerate(zip(found, expected, strict=True)) if not torch.equal(mine, other)] == []


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Two blocks 4096 wide in bfloat16, where kernels take other paths than in tiny layers; 270 MB."""
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=4096,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=256,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    source = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        for start in range(0, flat.numel(), source.numel()):
            flat[start : start + source.numel()].copy_(source[: flat.numel() - start])
        if "norm" in name:
            parameter.data.fill_(1.0)
    folder = tmp_path_factory.mktemp("wide")
    model.save_pretrained(folder)
    yield folder
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("technique", ["", "int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_at_width_4096(technique, wide):
    """Each block is read into its slot once and stays there; that it is used from there, at the addresses of a slot, is the point."""
    techniques = {technique: {}} if technique else {}
    prompt = ids((1, 24), 384)
    with build(*planned(wide, **techniques)) as held:
        expected = written(held.model, prompt)
    with build(*planned(wide, 0, **techniques)) as held:
        assert torch.equal(written(held.model, prompt), expected)
        assert held.stream.traffic().bytes_moved > 0
