"""Writes a GGUF file of a named Llama shape with random weights, straight in quantized blocks, tensor by tensor.

python make_gguf.py --shape tinyllama-1.1b --type q8_0 [--out FILE]   (needs the PyPI package gguf)

Every matrix, embedding and head included, has the one type ("--pure" in llama-quantize's words); norms are f32. The
vocabulary is a dummy SPM one that loads in llama.cpp. For memory and speed only: the weights mean nothing.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType, TokenType
from peer_common import load_shape, model_folder, model_tensors, print_result, shape_names

STD = 0.02
# For each type: its GGUF numbers, the bytes of quants in a block of 32 weights, the variance of one uniformly random quant.
TYPES = {
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0, 32, (256**2 - 1) / 12),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0, 16, (16**2 - 1) / 12),
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face Llama tensor."""
    if name in NAMES:
        return NAMES[name]
    _, _, layer, inner = name.split(".", 3)
    return f"blk.{layer}.{NAMES[inner.removesuffix('.weight')]}.weight"


def random_blocks(shape: tuple[int, int], kind: str, rng: np.random.Generator) -> np.ndarray:
    """The bytes of a matrix of random quants: in each block an f16 scale, then the quants."""
    _, _, quant_bytes, variance = TYPES[kind]
    rows, columns = shape
    blocks = np.empty((rows, columns // 32, 2 + quant_bytes), dtype=np.uint8)
    scale = np.array([STD / variance**0.5], dtype=np.float16)
    blocks[..., :2] = scale.view(np.uint8)
    blocks[..., 2:] = np.frombuffer(rng.bytes(rows * columns // 32 * quant_bytes), np.uint8).reshape(rows, -1, quant_bytes)
    return blocks.reshape(rows, -1)


def tensor_data(tensors: list, kind: str, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _, shape in tensors:
        yield np.ones(shape, dtype=np.float32) if len(shape) == 1 else random_blocks(shape, kind, rng)


def add_fields(writer: gguf.GGUFWriter, config: dict, kind: str) -> None:
    """The metadata that llama.cpp asks of a Llama model."""
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def add_dummy_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """An SPM vocabulary: three special tokens, the 256 bytes, then made-up words."""
    special = [b"<unk>", b"<s>", b"</s>"]
    single = [f"<0x{byte:02X}>".encode() for byte in range(256)]
    words = [f"\u2581w{number}".encode() for number in range(size - len(special) - len(single))]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256, *[TokenType.NORMAL] * len(words)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(special + single + words)
    writer.add_token_scores([-float(number) for number in range(size)])
    writer.add_token_types([int(kind) for kind in types])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def stored_form(shape: tuple[int, ...], kind: str) -> tuple[tuple[int, ...], np.dtype, GGMLQuantizationType | None]:
    """Shape and dtype of a tensor as stored (rows of bytes for a matrix), and its quantized type."""
    if len(shape) == 1:
        return shape, np.dtype(np.float32), None
    quant_type, _, quant_bytes, _ = TYPES[kind]
    return (shape[0], shape[1] // 32 * (2 + quant_bytes)), np.dtype(np.uint8), quant_type


def write_gguf(config: dict, name: str, kind: str, out: Path, seed: int) -> int:
    """Writes the file and returns the bytes of its weights."""
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name(name)
    add_fields(writer, config, kind)
    add_dummy_vocabulary(writer, config["vocab_size"])
    tensors = model_tensors(config)
    total = 0
    for tensor, shape in tensors:
        stored, dtype, quant_type = stored_form(shape, kind)
        size = math.prod(stored) * dtype.itemsize
        writer.add_tensor_info(gguf_name(tensor), stored, dtype, size, raw_dtype=quant_type)
        total += size
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for data in tensor_data(tensors, kind, seed):
        writer.write_tensor_data(data)
    writer.close()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, choices=shape_names())
    parser.add_argument("--type", required=True, choices=list(TYPES))
    parser.add_argument("--out", type=Path, help="default: models/SHAPE-TYPE.gguf in the user's cache folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = args.out or model_folder(f"{args.shape}-{args.type}.gguf")
    total = write_gguf(load_shape(args.shape), args.shape, args.type, out, args.seed)
    print_result({"file": str(out), "shape": args.shape, "type": args.type, "weight_bytes": total})


if __name__ == "__main__":
    main()
