"""Export formats: quantized models as compressed-tensors and GPTQ files, which others decode to our very weights, or nothing at all."""

import json
import os
import subprocess
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from families import ids, make
from safetensors.torch import load_file

from tightfit import catalog
from tightfit.describe.source import describe
from tightfit.formats.linear import QuantizedLinear
from tightfit.runtime import export_formats, export_model
from tightfit.runtime.adapters import save_adapter
from tightfit.runtime.export_formats import pack_words
from tightfit.runtime.quantize import Job, quantize
from tightfit.terms.errors import TightfitError

SAMPLES = ids((4, 24), 384)
LLAMA_CPP = os.environ.get("LLAMA_CPP", "")


@pytest.fixture(scope="session")
def quantized(saved, tmp_path_factory):
    """The folder that `tightfit quantize` makes of a family; made once. Not to be written to."""
    root = tmp_path_factory.mktemp("quantized")

    def folder(family, technique):
        out = root / f"{family}-{technique}".replace(":", "-")
        if not out.exists():
            in_few_bits(saved(family), out, technique)
        return out

    return folder


def in_few_bits(folder, out, technique):
    name, settings = catalog.parse(technique)
    quantize(Job(describe(str(folder), "embed"), catalog.make(name, settings), SAMPLES, 2, torch.device("cpu")), out)


def loaded(folder, family, **settings):
    import transformers

    return getattr(transformers, type(make(family)).__name__).from_pretrained(folder, **settings).eval()


def our_weights(model):
    return {path: module.dequantize() for path, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def logits(model):
    with torch.no_grad():
        return model(input_ids=SAMPLES[:2]).logits.float()


def state(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def note(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [1, 5, 31, 32, 37, 64])
def test_a_row_is_one_number_in_the_base_of_its_codes(bits, columns):
    codes = torch.randint(0, 2**bits, (3, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    words = pack_words(codes, bits)
    assert words.shape == (3, -(-columns * bits // 32)) and words.dtype == torch.int32
    for row, packed in zip(codes.tolist(), words.contiguous().numpy(), strict=True):
        assert int.from_bytes(packed.astype("<i4").tobytes(), "little") == sum(code << (bits * k) for k, code in enumerate(row))


def fields(words, bits, count):
    """The first `count` fields along the last axis: of 2, 4 and 8 bits as many as a word holds; of 3 bits 32 in three words.

    Those of 3 bits as AutoGPTQ's `QuantLinear.pack` describes them: ten, then one across two words, ten, one across, ten.
    """
    words = words.astype(np.int64) & 0xFFFFFFFF
    if bits != 3:
        shifts = np.arange(0, 32, bits)
        return (words[..., None] >> shifts & (1 << bits) - 1).reshape(*words.shape[:-1], -1)[..., :count]
    first, second, third = (words[..., place::3] for place in range(3))
    found = [first >> 3 * k & 7 for k in range(10)] + [first >> 30 | (second & 1) << 2]
    found += [second >> 3 * k + 1 & 7 for k in range(10)] + [second >> 31 | (third & 3) << 1]
    found += [third >> 3 * k + 2 & 7 for k in range(10)]
    return np.stack(found, axis=-1).reshape(*words.shape[:-1], -1)[..., :count]


def from_compressed_tensors(tensors, path, bits):
    """The dense weight in float32."""
    packed, zeros, scale, shape = (tensors[f"{path}.weight_{part}"] for part in ("packed", "zero_point", "scale", "shape"))
    rows, columns = shape.tolist()
    codes, zeros = fields(packed.numpy(), bits, columns), fields(zeros.t().contiguous().numpy(), bits, rows).T  # zeros: (rows, groups)
    steps = torch.from_numpy(codes - zeros.repeat(columns // zeros.shape[1], axis=1))
    return steps.float() * scale.float().repeat_interleave(columns // scale.shape[1], dim=1)


def from_gptq(tensors, path, config):
    """The dense weight in float32, (outputs, inputs): `scales[g_idx] · (code - zero[g_idx])`, of version 1 `zero = stored + 1`."""
    bits = config["bits"]
    qweight, qzeros, scales, g_idx = (tensors[f"{path}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    codes = fields(qweight.t().contiguous().numpy(), bits, len(g_idx)).T  # (inputs, outputs)
    zeros = fields(qzeros.numpy(), bits, scales.shape[1]) + (config["checkpoint_format"] == "gptq")  # (groups, outputs)
    assert scales.dtype == torch.float16 and g_idx.dtype == qweight.dtype == qzeros.dtype == torch.int32
    return (scales[g_idx].float() * torch.from_numpy(codes - zeros[g_idx])).t()


@pytest.mark.parametrize(
    ("family", "technique"),
    [("llama", "rtn:bits=4"), ("opt", "rtn:bits=2,group=32"), ("llama", "gptq:bits=8,group=32"), ("llama", "lean:bits=4,grid=affine")],
)
def test_compressed_tensors_decode_to_our_weights(family, technique, quantized, tmp_path):
    source = quantized(family, technique)
    export_model.export_model(source, tmp_path / "out", "compressed-tensors")
    tensors, config, group = state(tmp_path / "out"), note(tmp_path / "out"), 32 if "group" in technique else None
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights.get("group_size"), weights["strategy"]) == ((32, "group") if group else (None, "channel"))
    assert config["ignore"] == ["lm_head"] and not weights["symmetric"]
    expected = our_weights(loaded(source, family))
    for path, weight in expected.items():
        assert torch.equal(from_compressed_tensors(tensors, path, weights["num_bits"]), weight)
    inside = tuple(f"{path}.weight" for path in expected)
    before, after = ({name: tensor for name, tensor in part.items() if not name.startswith(inside)} for part in (state(source), tensors))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 32])
def test_gptq_files_decode_to_our_weights(bits, group, quantized, tmp_path):
    source = quantized("llama", f"rtn:bits={bits},group={group}")
    export_model.export_model(source, tmp_path / "out", "gptq")
    config, tensors = note(tmp_path / "out"), state(tmp_path / "out")
    told = {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "desc_act": False, "sym": False}
    assert config.items() >= told.items() and "dynamic" not in config
    for path, weight in our_weights(loaded(source, "llama")).items():
        assert torch.equal(from_gptq(tensors, path, config), weight)


@pytest.mark.parametrize("least", [0, 1])
def test_gptq_is_of_version_2_only_where_a_zero_is_nought(least, saved, tmp_path):
    model = make("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (module for module in layer.modules() if isinstance(module, torch.nn.Linear)):
                linear.weight[:, 0] = -1.0
        model.model.layers[2].mlp.up_proj.weight[5, 0] *= least
        model.model.layers[2].mlp.up_proj.weight[5].abs_().mul_(1 - 2 * least)
    model.save_pretrained(tmp_path / "dense")
    in_few_bits(tmp_path / "dense", tmp_path / "few", "rtn:bits=4")
    export_model.export_model(tmp_path / "few", tmp_path / "out", "gptq")
    config, path = note(tmp_path / "out"), "model.layers.2.mlp.up_proj"
    assert config["checkpoint_format"] == ("gptq" if least else "gptq_v2")
    assert torch.equal(from_gptq(state(tmp_path / "out"), path, config), our_weights(loaded(tmp_path / "few", "llama"))[path])


def test_conv1d_becomes_gptq_and_not_compressed_tensors(quantized, tmp_path):
    source = quantized("gpt2", "rtn:bits=4")
    export_model.export_model(source, tmp_path / "out", "gptq")
    tensors = state(tmp_path / "out")
    for path, weight in our_weights(loaded(source, "gpt2")).items():
        assert torch.equal(from_gptq(tensors, path, note(tmp_path / "out")), weight)
    with pytest.raises(TightfitError, match=r"`transformer.h.0.attn.c_attn` is a `Conv1D`"):
        export_model.export_model(source, tmp_path / "other", "compressed-tensors")


def test_layers_that_stayed_dense_are_told(quantized, tmp_path):
    source = quantized("llama", "rtn:bits=4,where=mlp|layers.0.self_attn")
    attention = [f"model.layers.{block}.self_attn.{name}_proj" for block in (1, 2, 3) for name in "qkvo"]
    for to in ("compressed-tensors", "gptq"):
        export_model.export_model(source, tmp_path / to, to)
        assert all(f"{path}.weight" in state(tmp_path / to) for path in attention)
    assert note(tmp_path / "compressed-tensors")["ignore"] == [*attention, "lm_head"]
    assert note(tmp_path / "gptq")["dynamic"].keys() == {"-:^" + path.replace(".", r"\.") + "$" for path in attention}


def odd_llama(folder, width, weight=None):
    import transformers

    config = make("llama").config
    config.intermediate_size = width
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config)
    if weight is not None:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[3, 4] = weight
    model.save_pretrained(folder / "dense")
    in_few_bits(folder / "dense", folder / "few", "rtn:bits=4")
    return folder / "few"


def test_widths_that_fill_no_words(tmp_path):
    source = odd_llama(tmp_path, 150)
    export_model.export_model(source, tmp_path / "out", "compressed-tensors")
    tensors = state(tmp_path / "out")
    for path, weight in our_weights(loaded(source, "llama")).items():
        assert torch.equal(from_compressed_tensors(tensors, path, 4), weight)
    with pytest.raises(TightfitError, match=r"`model.layers.0.mlp.gate_proj` has 150 outputs; GPTQ files hold multiples of 32"):
        export_model.export_model(source, tmp_path / "other", "gptq")


def test_a_scale_that_float16_cannot_hold(tmp_path):
    source = odd_llama(tmp_path, 160, weight=1e7)
    with pytest.raises(TightfitError, match=r"a scale of `model.layers.1.mlp.down_proj` is too large"):
        export_model.export_model(source, tmp_path / "out", "gptq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "few"]
    export_model.export_model(source, tmp_path / "out", "compressed-tensors")


def faulty_reader():
    """Versions that prepare the zeros' place unpacked, so that only `dequantize=True` loads them."""
    from compressed_tensors import __version__

    return (0, 18) <= tuple(int(part) for part in __version__.split(".")[:2]) <= (0, 20)


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="the package `compressed-tensors` is not installed")
@pytest.mark.parametrize("plainly", [False, True])
@pytest.mark.parametrize(
    ("family", "technique"),
    [("llama", "rtn:bits=4"), ("llama-tied", "gptq:bits=4,group=32"), ("opt", "rtn:bits=2,group=32"), ("bert", "rtn:bits=8")],
)
def test_transformers_loads_compressed_tensors(family, technique, plainly, quantized, tmp_path, request):
    import transformers

    if plainly and faulty_reader():
        request.applymarker(pytest.mark.xfail(raises=RuntimeError, strict=True, reason="compressed-tensors 0.18 to 0.20 misplaces zeros"))
    export_model.export_model(quantized(family, technique), tmp_path / "out", "compressed-tensors")
    settings = {} if plainly else {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    theirs, ours = loaded(tmp_path / "out", family, **settings), loaded(quantized(family, technique), family)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-5, atol=2e-6)  # sums in another order
    for path, weight in our_weights(ours).items():
        assert torch.equal(theirs.get_submodule(path).weight, weight)


CONVERT = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.llama import LlamaModel
LlamaModel.set_vocab = lambda self: None  # the tiny models have no tokenizer
script, folder, file = sys.argv[1] + "/convert_hf_to_gguf.py", *sys.argv[2:]
sys.argv = [script, "--outtype", "f32", "--outfile", file + ".gguf", folder]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as leave:
    assert not leave.code
import gguf, numpy
numpy.savez(file, **{tensor.name: tensor.data for tensor in gguf.GGUFReader(file + ".gguf").tensors})
"""


@pytest.mark.skipif(not Path(LLAMA_CPP, "convert_hf_to_gguf.py").exists() or not LLAMA_CPP, reason="set `LLAMA_CPP` to llama.cpp's sources")
@pytest.mark.parametrize(
    ("technique", "to"), [("rtn:bits=4,group=32", "compressed-tensors"), ("rtn:bits=4,group=32", "gptq"), ("rtn:bits=2,group=0", "gptq")]
)
def test_llama_cpp_converts(technique, to, quantized, tmp_path):
    export_model.export_model(quantized("llama", technique), tmp_path / "out", to)
    words = [sys.executable, "-c", CONVERT, LLAMA_CPP, str(tmp_path / "out"), str(tmp_path / "found.npz")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found, weights = np.load(tmp_path / "found.npz"), our_weights(loaded(quantized("llama", technique), "llama"))
    for block in range(4):
        for theirs, ours in (("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"), ("ffn_down", "mlp.down_proj")):
            assert np.array_equal(found[f"blk.{block}.{theirs}.weight"], weights[f"model.layers.{block}.{ours}"].numpy())


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq"])
def test_files_are_those_of_the_source(to, quantized, tmp_path):
    source, told = quantized("llama", "rtn:bits=4"), []
    size = export_model.export_model(source, tmp_path / "out", to, lambda *words: told.append(words))
    assert {file.name for file in source.iterdir()} == {file.name for file in (tmp_path / "out").iterdir()}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {name: file.name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == found and index["metadata"]["total_size"] == size
    assert size == sum(tensor.nbytes for tensor in state(tmp_path / "out").values())
    assert [done for done, _, _ in told] == sorted({done for done, _, _ in told}) and told[-1][:2] == (size, size)
    loaded(source, "llama").save_pretrained(tmp_path / "single")
    export_model.export_model(tmp_path / "single", tmp_path / "whole", to)
    assert not (tmp_path / "whole" / "model.safetensors.index.json").exists()
    single, sharded = state(tmp_path / "whole"), state(tmp_path / "out")
    assert single.keys() == sharded.keys() and all(torch.equal(single[name], sharded[name]) for name in single)
    assert note(tmp_path / "whole") == note(tmp_path / "out")


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq"])
def test_one_tensor_is_there_at_a_time(to, quantized, tmp_path, monkeypatch):
    read, alive = [], []

    def watched(record):
        alive.append(sum(other() is not None for other in read))
        tensor = export_formats_read(record)
        read.append(weakref.ref(tensor))
        return tensor

    export_formats_read = export_formats.read_record
    for room in (export_formats, export_model):
        monkeypatch.setattr(room, "read_record", watched)
    export_model.export_model(quantized("llama", "rtn:bits=4"), tmp_path / "out", to)
    assert len(alive) > 90 and max(alive) == 0


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["stopped", "full"])
def test_a_fault_on_the_way_leaves_nothing(fault, quantized, tmp_path):
    def stop(done, whole, name):
        if done > whole // 2:
            raise fault

    with pytest.raises((KeyboardInterrupt, TightfitError)):
        export_model.export_model(quantized("llama", "rtn:bits=4"), tmp_path / "out", "gptq", stop)
    assert not list(tmp_path.iterdir())


def test_the_command_line(quantized, tmp_path, tightfit_says):
    source = quantized("llama", "rtn:bits=4")
    said = tightfit_says("export", source, "-o", tmp_path / "default")
    assert said.code == 0 and "for programs that read compressed-tensors" in said.out
    assert note(tmp_path / "default")["format"] == "pack-quantized"
    said = tightfit_says("export", source, "--to", "gptq", "-o", tmp_path / "gptq", "--json")
    size = sum(tensor.nbytes for tensor in state(tmp_path / "gptq").values())
    assert json.loads(said.out) == {"model": str(tmp_path / "gptq"), "format": "gptq", "bytes": size}


@pytest.mark.parametrize(
    ("source", "words", "line", "hint"),
    [
        ("rtn:bits=4", ["--to", "gptqq"], "no format is called `gptqq`", "did you mean `gptq`"),
        ("rtn:bits=4", ["--to", "peft"], "holds a model and no adapter", "`--to compressed-tensors` or `--to gptq`"),
        ("rtn:bits=4", ["--rank", "2"], "`--rank` cuts an adapter", "leave it out"),
        ("lean:bits=3", [], "lie on tables of values", "--technique lean:grid=affine"),
        ("lean:bits=3", ["--to", "gptq"], "lie on tables of values", "--technique gptq"),
        ("rtn:bits=3,group=0", [], "`compressed-tensors` files hold 2, 4, 8 bits, not 3", "`--to gptq` holds them"),
        ("qwen3-moe", ["--to", "gptq"], "holds the experts of a mixture in one", "as it is"),
        ("dense", [], "holds a dense model", "quantize the original model"),
        ("adapter", ["--to", "gptq"], "holds what was tuned", "`--to peft`"),
        ("nowhere", ["--to", "gptq"], "there is no folder", "tightfit quantize"),
        ("taken", [], "is there already", "a new folder"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(source, words, line, hint, quantized, saved, tmp_path, tightfit_says):
    if source == "adapter":
        from tightfit import apply

        save_adapter(apply(make("llama"), {"lora": {"rank": 2}}), {"lora": {"rank": 2}}, tmp_path / source, {"base": "b", "digest": "d"})
    if source == "taken":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("x")
    folder = {
        "dense": saved("llama"),
        "qwen3-moe": source == "qwen3-moe" and quantized("qwen3-moe", "rtn:bits=4"),
        "taken": quantized("llama", "rtn:bits=4"),
    }.get(source) or (quantized("llama", source) if ":" in source else tmp_path / source)
    before = sorted(tmp_path.rglob("*"))
    said = tightfit_says("export", folder, "-o", tmp_path / "out", *words)
    assert said.code == 1 and said.out == "" and sorted(tmp_path.rglob("*")) == before
    told, _, advice = said.err.partition("hint:")
    assert told.startswith("error:") and line in told and hint in advice
