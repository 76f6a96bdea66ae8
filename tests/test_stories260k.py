"""The conversion of stories260K, held against a plain forward pass over llama2.c's own file and against llama2.c's way to tokenize."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from stories260k import checkpoint, convert, data_folder, read_pieces, read_tensors
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

STORIES = data_folder() / "corpora" / "tinystories" / "tinystories_sample.txt"

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not checkpoint().exists(), reason=f"stories260K is not in {checkpoint()}: set `TIGHTFIT_DATA`"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(tmp_path_factory.mktemp("stories260k"))


def plain_logits(ids: Tensor) -> Tensor:
    """llama2.c's `forward`, over all positions at once.  # (tokens,) → (tokens, vocabulary)"""
    sizes, w = read_tensors(checkpoint() / "stories260K.bin")
    tokens, head = len(ids), sizes.width // sizes.heads
    rates = 10000.0 ** (-torch.arange(0, head, 2) / head)
    turn = torch.polar(torch.ones(tokens, head // 2), torch.outer(torch.arange(tokens), rates))  # (tokens, head / 2)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    def rotate(x: Tensor, heads: int) -> Tensor:  # neighbours are the parts of a complex number
        pairs = torch.view_as_complex(x.view(tokens, heads, head // 2, 2).contiguous())
        return torch.view_as_real(pairs * turn[:, None]).reshape(tokens, heads, head)

    x = w["embedding"][ids]
    for at in range(sizes.blocks):
        seen = norm(x, w["attention_norm"][at])
        q, k = rotate(seen @ w["wq"][at].T, sizes.heads), rotate(seen @ w["wk"][at].T, sizes.kv_heads)
        v = (seen @ w["wv"][at].T).view(tokens, sizes.kv_heads, head)
        out = torch.empty(tokens, sizes.heads, head)
        for query in range(sizes.heads):
            shared = query // (sizes.heads // sizes.kv_heads)
            scores = q[:, query] @ k[:, shared].T / math.sqrt(head)
            scores.masked_fill_(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
            out[:, query] = scores.softmax(-1) @ v[:, shared]
        x = x + out.view(tokens, -1) @ w["wo"][at].T
        seen = norm(x, w["feed_forward_norm"][at])
        x = x + (functional.silu(seen @ w["w1"][at].T) * (seen @ w["w3"][at].T)) @ w["w2"][at].T
    return norm(x, w["norm"]) @ w["embedding"].T


def plain_encode(text: str) -> list[int]:
    """llama2.c's `encode`: characters or their bytes, then always the best merge, the leftmost of equals."""
    pieces = list(read_pieces(checkpoint() / "tok512.bin"))
    ids = {piece: at for at, (piece, _) in enumerate(pieces)}
    tokens = []
    for character in f" {text}":
        raw = character.encode()
        tokens += [ids[raw]] if raw in ids else [byte + 3 for byte in raw]
    while True:
        joined = [pieces[a][0] + pieces[b][0] for a, b in pairwise(tokens)]
        scored = [(pieces[ids[piece]][1], -at) for at, piece in enumerate(joined) if piece in ids]
        if not scored:
            return [1, *tokens]
        at = -max(scored)[1]
        tokens[at : at + 2] = [ids[joined[at]]]


def test_logits_are_those_of_the_plain_forward_pass(folder: Path) -> None:
    ids = torch.randint(3, 512, (64,), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(model(ids[None]).logits[0], plain_logits(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "text", ["Once upon a time, there was a little girl named Lily.", "a=b  {Zoë} §\n\n\t3 × 4 = 12", "“Don’t!” he said…"]
)
def test_texts_become_the_same_tokens_as_in_llama2_c_and_come_back(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    assert ids == plain_encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_page_of_stories_becomes_the_same_tokens(folder: Path) -> None:
    text = STORIES.read_text()[:3000].replace("<|endoftext|>", "")
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == plain_encode(text)


def test_stories_are_as_likely_as_their_author_says(folder: Path) -> None:
    """1.2968 nats a token is the card's figure for the validation part; these stories are of the same kind."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    losses = []
    for story in STORIES.read_text().split("<|endoftext|>")[:24]:
        ids = torch.tensor([tokenizer(story.strip())["input_ids"][:512]])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert 1.1 < sum(losses) / len(losses) < 1.45


def test_it_tells_the_story_of_its_card(folder: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    start = torch.tensor([[1]])
    told = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=70, do_sample=False, pad_token_id=2)
    assert tokenizer.decode(told[0], skip_special_tokens=True).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."
    )
