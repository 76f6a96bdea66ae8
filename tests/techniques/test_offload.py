"""Offload: real transformers models whose blocks take turns give what resident ones give, bit for bit, in any task."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, T5Config

from tightfit.contracts import Stage
from tightfit.describe.blocks import blocks_of
from tightfit.formats.image import image_of, write_image
from tightfit.runtime.stream import Stream
from tightfit.techniques.offload import Offload, StreamSocket
from tightfit.techniques.recompute import Recompute
from tightfit.terms.errors import TightfitError

LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=48, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0
)
T5 = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=3, num_heads=4, decoder_start_token_id=0)


def llama() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LLAMA).requires_grad_(False).eval()


def t5() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(T5).requires_grad_(False).eval()


def plug(model: nn.Module, technique: Offload, folder) -> Stream:
    """What the runtime does: rest the blocks on disk, and plug a ring into the socket."""
    blocks, images, end = model.stream_socket.blocks, {}, 0
    with open(folder / "spill", "w+b") as file:
        for position, block in blocks.items():
            images[position] = write_image(block, image_of(block), file, end)
            end += images[position].segments[0].length
    model.stream_socket.ring = Stream(blocks, images, technique.slots, "cpu")
    return model.stream_socket.ring


class Asked:
    """A ring that only writes down who asked: enough to see when forward passes ask."""

    def __init__(self) -> None:
        self.positions: list[int] = []

    def acquire(self, position: int) -> None:
        self.positions.append(position)


@pytest.mark.parametrize(("make", "streamed"), [(llama, (0, 2, 3, 4)), (t5, (0, 1, 2, 3, 4, 5)), (t5, (1, 4, 5))])
@pytest.mark.parametrize("slots", [2, 3])
def test_generation_is_the_resident_model_s(tmp_path, make, streamed, slots):
    tokens = torch.randint(1, 64, (2, 7))
    wanted = make().generate(tokens, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    model, technique = make(), Offload(streamed, slots)
    technique.apply(model)
    with plug(model, technique, tmp_path):
        for _ in range(2):
            got = model.generate(tokens, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
            assert torch.equal(got.sequences, wanted.sequences)
            assert all(torch.equal(a, b) for a, b in zip(got.logits, wanted.logits, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_the_resident_model_s(tmp_path, dropout):
    """Adapters inside the blocks, the embedding outside; every block recomputed, random states replayed."""
    grads = [tuned(tmp_path, dropout, technique) for technique in (None, Offload((0, 1, 3, 4)))]
    assert len(grads[0]) == 5 * 2 + 1 + 1 and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def tuned(folder, dropout: float, technique: Offload | None) -> list[torch.Tensor]:
    model = llama()
    for _, block in blocks_of(model):
        block.mlp = Adapted(block.mlp, dropout)
    model.get_input_embeddings().requires_grad_(True)
    if technique is not None:
        technique.apply(model)
    Recompute().apply(model)
    model.train()
    ring = plug(model, technique, folder) if technique is not None else None
    tokens = torch.arange(1, 13).view(2, 6)
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(5)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
    if ring is not None:
        ring.close()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]


class Adapted(nn.Module):
    """A small trainable detour with dropout beside a frozen layer."""

    def __init__(self, inner: nn.Module, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.down, self.up = inner, nn.Linear(48, 4, bias=False), nn.Linear(4, 48, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + self.up(self.down(self.dropout(x)))


def test_blocks_ask_once_forward_and_once_more_when_recomputed():
    model = llama()
    Offload((1, 3)).apply(model)
    Recompute().apply(model)
    ring = model.stream_socket.ring = Asked()
    model.get_input_embeddings().requires_grad_(True)
    loss = model(input_ids=torch.ones(1, 3, dtype=torch.long), labels=torch.ones(1, 3, dtype=torch.long)).loss
    assert ring.positions == [1, 3]
    loss.backward()
    assert ring.positions == [1, 3, 3, 1]


def test_positions_count_over_all_stacks():
    model = t5()
    Offload((2, 3)).apply(model)
    socket = model.stream_socket
    assert isinstance(socket, StreamSocket) and list(socket.blocks) == [2, 3]
    assert socket.blocks[2] is model.encoder.block[2] and socket.blocks[3] is model.decoder.block[0]
    assert not any("stream_socket" in name for name in model.state_dict())


def test_applies_on_meta_and_only_changes_forward():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA)
    names = list(model.state_dict())
    Offload((0,)).apply(model)
    assert list(model.state_dict()) == names and all(parameter.is_meta for parameter in model.parameters())
    assert Offload.stage is Stage.MOVE and Offload.quality == "exact" and Offload.stage < Recompute.stage


def test_a_copy_of_the_model_has_a_socket_of_its_own():
    model = llama()
    Offload((0,)).apply(model)
    other = copy.deepcopy(model)
    model.stream_socket.ring = Asked()
    other.stream_socket.ring = Asked()
    with torch.no_grad():
        other(input_ids=torch.ones(1, 2, dtype=torch.long))
    assert other.stream_socket.ring.positions == [0] and model.stream_socket.ring.positions == []
    assert other.stream_socket.blocks[0] is other.model.layers[0]


def test_a_block_without_a_ring_says_so():
    model = llama()
    Offload((4,)).apply(model)
    with pytest.raises(TightfitError, match="block 4 is streamed, and nothing brings its weights") as caught, torch.no_grad():
        model(input_ids=torch.ones(1, 2, dtype=torch.long))
    assert "tightfit.build" in caught.value.hint


@pytest.mark.parametrize(
    ("technique", "lines"),
    [
        (Offload(), ["names no block"]),
        (Offload((0, 5, -1)), ["no block lies at 5, -1; positions go from 0 to 4"]),
        (Offload((1, 1)), ["names a block twice"]),
        (Offload((0,), slots=1), ["at least 2", "not 1"]),
        (Offload((9,), slots=0), ["no block lies at 9", "not 0"]),
    ],
)
def test_wrong_settings_are_all_told_and_nothing_is_changed(technique, lines):
    model = llama()
    with pytest.raises(TightfitError) as caught:
        technique.apply(model)
    assert all(line in str(caught.value) for line in lines)
    assert "stream_socket" not in vars(model) and not any("forward" in vars(block) for _, block in blocks_of(model))


def test_models_without_blocks_and_models_offloaded_already():
    with pytest.raises(TightfitError, match="no repeated blocks"):
        Offload((0,)).apply(nn.Linear(2, 2))
    model = llama()
    Offload((0,)).apply(model)
    with pytest.raises(TightfitError, match="offloaded already"):
        Offload((1,)).apply(model)
