"""Stories260k: the trained 260K-parameter Llama of llama2.c as a Hugging Face folder, tokenizer and all, from where the real data lies."""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>")
SPACE = "\u2581"  # SentencePiece writes a space so


def data_folder() -> Path:
    """Where the real data lies: what `TIGHTFIT_DATA` names, or `shared/data` beside the checkout. It need not exist."""
    return Path(os.environ.get("TIGHTFIT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def checkpoint() -> Path:
    """The folder with `stories260K.bin` and `tok512.bin`. It need not exist."""
    return data_folder() / "weights" / "stories260K"


@dataclass(frozen=True)
class Sizes:
    """The seven numbers at the head of a llama2.c checkpoint."""

    width: int
    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int


def read_tensors(file: Path) -> tuple[Sizes, dict[str, Tensor]]:
    """The tensors of a tied llama2.c checkpoint under its own names, stacked over the blocks as they lie.  # wq: (blocks, d, d), …"""
    raw = file.read_bytes()
    sizes = Sizes(*struct.unpack_from("<7i", raw))
    numbers = torch.frombuffer(bytearray(raw), dtype=torch.float32, offset=28)
    width, hidden, blocks = sizes.width, sizes.hidden, sizes.blocks
    kv_width = width * sizes.kv_heads // sizes.heads
    shapes = {
        "embedding": (sizes.vocabulary, width),
        "attention_norm": (blocks, width),
        "wq": (blocks, width, width),
        "wk": (blocks, kv_width, width),
        "wv": (blocks, kv_width, width),
        "wo": (blocks, width, width),
        "feed_forward_norm": (blocks, width),
        "w1": (blocks, hidden, width),
        "w2": (blocks, width, hidden),
        "w3": (blocks, hidden, width),
        "norm": (width,),
    }
    counts = [torch.Size(shape).numel() for shape in shapes.values()]
    parts = numbers[: sum(counts)].split(counts)
    return sizes, {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of a projection in the order of transformers: llama2.c turns neighbours, transformers the halves of a head.  # (out, in)"""
    out, width = weight.shape
    return weight.view(heads, out // heads // 2, 2, width).transpose(1, 2).reshape(out, width)


def state_dict(sizes: Sizes, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights by transformers' names. The head is the embedding."""
    state = {"model.embed_tokens.weight": tensors["embedding"], "model.norm.weight": tensors["norm"]}
    for at in range(sizes.blocks):
        block = {
            "input_layernorm": tensors["attention_norm"][at],
            "self_attn.q_proj": half_split(tensors["wq"][at], sizes.heads),
            "self_attn.k_proj": half_split(tensors["wk"][at], sizes.kv_heads),
            "self_attn.v_proj": tensors["wv"][at],
            "self_attn.o_proj": tensors["wo"][at],
            "post_attention_layernorm": tensors["feed_forward_norm"][at],
            "mlp.gate_proj": tensors["w1"][at],
            "mlp.down_proj": tensors["w2"][at],
            "mlp.up_proj": tensors["w3"][at],
        }
        state |= {f"model.layers.{at}.{name}.weight": weight for name, weight in block.items()}
    return state


def convert_model(file: Path) -> LlamaForCausalLM:
    """The model, float32, ready to run."""
    sizes, tensors = read_tensors(file)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_hidden_layers=sizes.blocks,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state_dict(sizes, tensors), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model.eval()


def read_pieces(file: Path) -> Iterator[tuple[bytes, float]]:
    """The pieces of llama2.c's vocabulary with their scores, in the order of their ids."""
    raw, at = file.read_bytes(), 4
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        yield raw[at + 8 : at + 8 + length], score
        at += 8 + length


def convert_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer: pieces merged by score, as SentencePiece does, and bytes for what is in no piece. `<s>` opens every text."""
    found = list(read_pieces(file))
    names = [*SPECIAL, *(piece.decode().replace(" ", SPACE) for piece, _ in found[len(SPECIAL) :])]
    scores = {name: score for name, (_, score) in zip(names, found, strict=True)}
    ids = {name: at for at, name in enumerate(names)}
    pieces = sorted(names[len(SPECIAL) + 256 :], key=lambda name: -scores[name])
    merges = [(name[:at], name[at:]) for name in pieces for at in range(1, len(name)) if name[:at] in ids and name[at:] in ids]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=SPECIAL[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    turned_back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(turned_back)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


def convert(folder: Path) -> Path:
    """Write the model and its tokenizer into `folder`, as `save_pretrained` does, where they are not there yet."""
    if not (folder / "model.safetensors").exists():
        convert_tokenizer(checkpoint() / "tok512.bin").save_pretrained(folder)
        convert_model(checkpoint() / "stories260K.bin").save_pretrained(folder)
    return folder
