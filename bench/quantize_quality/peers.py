"""Peers: what others make of the same weights, each decoded again, so that one scorer serves all; and how many bits a weight takes.

- `nf4`: bitsandbytes' NF4 with double quantization, as the technique `nf4` stores it (tests compare it with bitsandbytes bit by bit);
  `nf4-plain`: its scales in 32 bits, bitsandbytes' default.
- `hqq`: torchao's HQQ solver; needs the PyPI package torchao.
- `k-quants`: llama.cpp's `llama-quantize` (`peers/build_llama_cpp.sh`; its folder in `LLAMA_CPP`); needs the PyPI package gguf.
Only the linear layers of the blocks are changed, as in all other rows.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peers"))
from tightfit.describe.blocks import blocks_of
from tightfit.formats.linear import QuantizedLinear

HQQ_GROUP = 64
"""Weights that share a scale and a zero of 16 bits, as torchao's and HQQ's examples have it; a whole row where that does not divide it."""

K_QUANTS = {4: "Q4_K_S", 3: "Q3_K_S", 2: "Q2_K"}
"""llama.cpp's mixes. Rows whose length is no multiple of 256 get another of its types, which is larger."""


def peer_model(method: str, bits: int, model: nn.Module) -> tuple[nn.Module, float]:
    """The model with its blocks' linear layers as the peer makes them, and bits per weight of these."""
    if method.startswith("nf4"):
        return _nf4(model, double_quantization=method == "nf4")
    layers = {
        f"{path}.{name}": layer for path, block in blocks_of(model) for name, layer in block.named_modules() if type(layer) is nn.Linear
    }
    weights = {path: layer.weight.detach() for path, layer in layers.items()}
    found, stored_bits = _hqq(weights, bits) if method == "hqq" else _k_quants(weights, model, bits)
    for path, layer in layers.items():
        layer.weight.data.copy_(found[path])
    return model, stored_bits / sum(weight.numel() for weight in weights.values())


def _nf4(model: nn.Module, double_quantization: bool) -> tuple[nn.Module, float]:
    import tightfit

    tightfit.apply(model, {"nf4": {"layout": "standard", "double_quantization": double_quantization}})
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    stored_bits = sum(8 * tensor.nbytes for layer in layers for tensor in layer.stored)
    return model, stored_bits / sum(layer.shape[0] * layer.shape[1] for layer in layers)


def _hqq(weights: dict[str, Tensor], bits: int) -> tuple[dict[str, Tensor], float]:
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq as choose

    found, stored_bits = {}, 0.0
    for path, weight in weights.items():
        group = HQQ_GROUP if weight.shape[1] % HQQ_GROUP == 0 else weight.shape[1]
        codes, scale, zero, _ = choose(weight, nbits=bits, group_size=group, device="cpu", raw_output=True)
        steps = codes.float().reshape(-1, group) - zero.float().reshape(-1, 1)
        found[path] = (steps * scale.float().reshape(-1, 1)).view_as(weight)
        stored_bits += weight.numel() * (bits + 32 / group)
    return found, stored_bits


def _k_quants(weights: dict[str, Tensor], model: nn.Module, bits: int) -> tuple[dict[str, Tensor], float]:
    """Through files; the order of q's and k's rows, which llama.cpp turns, does not matter to a quantization of rows."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tool = Path(os.environ.get("LLAMA_CPP") or Path.home() / ".cache" / "tightfit-bench" / "llama.cpp") / "bin" / "llama-quantize"
    with tempfile.TemporaryDirectory() as room:
        dense, few = Path(room) / "dense.gguf", Path(room) / "few.gguf"
        _write(dense, model)
        subprocess.run([tool, dense, few, K_QUANTS[bits], "1"], check=True, capture_output=True)
        tensors = {tensor.name: tensor for tensor in GGUFReader(few).tensors}
        names = {path: _gguf_name(f"{path}.weight") for path in weights}
        found = {path: torch.tensor(dequantize(tensors[name].data, tensors[name].tensor_type)) for path, name in names.items()}
        return found, sum(8 * tensors[name].n_bytes for name in names.values())


def _gguf_name(name: str) -> str:
    from make_gguf import gguf_name

    return gguf_name(name)


def _write(file: Path, model: nn.Module) -> None:
    """The Llama model's weights in 32 bits, with a made-up vocabulary."""
    import gguf
    from make_gguf import add_dummy_vocabulary

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_dummy_vocabulary(writer, config.vocab_size)
    for name, tensor in model.named_parameters():
        writer.add_tensor(_gguf_name(name), tensor.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
