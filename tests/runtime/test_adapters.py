"""Adapters: files that PEFT and transformers load, that come back bit for bit, and that are never half there."""

import copy
import functools
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from families import ids, make
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tightfit
from tightfit import catalog
from tightfit.describe.blocks import blocks_of
from tightfit.describe.source import describe
from tightfit.runtime import files
from tightfit.runtime.adapters import check_adapter, facts_of, load_adapter, read_adapter, save_adapter
from tightfit.runtime.build import build
from tightfit.terms.errors import TightfitError
from tightfit.terms.plan import Plan
from tightfit.terms.workload import Workload

FACTS = {"base": "some/base", "digest": "sha256:00", "tuning": {"steps": 3}}
LORA = {"lora": {"rank": 4, "alpha": 12.0}}
DYLORA = {"dylora": {"rank": 4, "alpha": 12.0}}
SIDE = {"side": {"reduction": 4}}


def stir(model):
    """Everything that is trained says something."""
    numbers = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=numbers)
    return model


def adapted(techniques, family="llama"):
    return stir(tightfit.apply(make(family), techniques))


def logits(model, high=384):
    with torch.no_grad():
        return model(input_ids=ids((2, 9), high)).logits


def alike(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("family", "base"),
    [("llama", {}), ("llama", {"int8": {}}), ("gpt2", {"nf4": {}}), ("gpt2", {}), ("bloom", {}), ("opt", {"nf4": {}})],
    ids=str,
)
def test_plain_peft_loads_what_was_saved(family, base, tmp_path):
    """Whatever the base rested in: over the dense one the logits are those of the same adapter there."""
    techniques = base | LORA
    model = adapted(techniques, family)
    save_adapter(model, techniques, tmp_path, FACTS)
    plain = make(family)
    loaded = PeftModel.from_pretrained(make(family), tmp_path)
    dense = tightfit.apply(make(family), LORA)
    load_adapter(dense, read_adapter(tmp_path))
    assert torch.equal(logits(loaded), logits(dense))
    assert not torch.equal(logits(loaded), logits(plain))
    if not base:
        assert torch.equal(logits(loaded), logits(model))


def test_peft_reads_its_own_config(tmp_path):
    save_adapter(adapted(LORA), LORA, tmp_path, FACTS)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha, config.base_model_name_or_path, config.task_type) == (4, 12.0, "some/base", "CAUSAL_LM")
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_other_families_than_decoders(family, tmp_path):
    """BERT has linear layers of the same name outside its blocks, so the paths are written out."""
    model = adapted(LORA, family)
    save_adapter(model, LORA, tmp_path, FACTS)
    loaded = PeftModel.from_pretrained(make(family), tmp_path)
    batch = {"input_ids": ids((2, 9), 384)} | ({"decoder_input_ids": ids((2, 5), 384)} if family == "t5" else {})
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        assert not torch.equal(make(family)(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("techniques", [LORA, DYLORA, SIDE, LORA | {"nf4": {}}, {}], ids=["lora", "dylora", "side", "nf4+lora", "whole"])
def test_there_and_back_to_the_bit(techniques, tmp_path):
    model = adapted(techniques)
    save_adapter(model, techniques, tmp_path, FACTS)
    found = read_adapter(tmp_path)
    name = next((name for name in techniques if name != "nf4"), "")
    assert (found.technique, found.base, found.digest, found.architecture) == (name, "some/base", "sha256:00", "LlamaForCausalLM")
    assert found.facts == {"tuning": {"steps": 3}}
    other = tightfit.apply(make("llama"), techniques)
    assert not torch.equal(logits(other), logits(model))
    load_adapter(other, found)
    trained = [{name: tensor for name, tensor in held.named_parameters() if tensor.requires_grad} for held in (model, other)]
    assert alike(*trained) and torch.equal(logits(other), logits(model))
    fresh = make("llama")
    tightfit.apply(fresh, {name: settings for name, settings in techniques.items() if name == "nf4"})
    load_adapter(fresh, found)  # which applies the technique first
    assert torch.equal(logits(fresh), logits(model))
    again = tmp_path / "again"
    save_adapter(other, techniques, again, FACTS)
    assert all((tmp_path / file.name).read_bytes() == file.read_bytes() for file in again.iterdir())


@pytest.mark.parametrize("techniques", [LORA, SIDE], ids=["lora", "side"])
def test_into_a_model_that_was_built_from_files(techniques, saved, tmp_path):
    save_adapter(adapted(techniques), techniques, tmp_path, FACTS)
    skeleton = describe(str(saved("llama")))
    plan = Plan.all_resident(str(saved("llama")), Workload("generate", 1, 12, 6), len(blocks_of(skeleton.meta_model())), techniques)
    with build(plan, skeleton) as built:
        load_adapter(built, read_adapter(tmp_path))
        assert torch.equal(logits(built.model), logits(adapted(techniques)))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "opt", "qwen3", "mixtral"])
def test_plain_transformers_loads_a_whole_model(family, saved, tmp_path):
    """Experts go back under the names that checkpoints have for them; tied weights are stored once."""
    model = stir(make(family))
    save_adapter(model, {}, tmp_path, FACTS, str(saved(family)))
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert alike(loaded.state_dict(), model.state_dict())
    assert loaded.dtype == model.dtype
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(saved(family) / "model.safetensors").keys()
    other = make(family)
    load_adapter(other, read_adapter(tmp_path))
    assert alike(other.state_dict(), model.state_dict())


def test_the_tokenizer_comes_along(tmp_path):
    skeleton = describe("tightfit-demo")
    model = AutoModelForCausalLM.from_pretrained(skeleton.folder)
    save_adapter(model, {"recompute": {}}, tmp_path, facts_of(skeleton), skeleton.folder)
    assert (
        AutoTokenizer.from_pretrained(tmp_path)("the sea").input_ids == AutoTokenizer.from_pretrained(skeleton.folder)("the sea").input_ids
    )
    assert {file.name for file in tmp_path.iterdir()} == {
        *("config.json", "model.safetensors", "tightfit.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    }
    check_adapter(read_adapter(tmp_path), skeleton)


@pytest.mark.parametrize("model", [lambda: tightfit.apply(make("llama"), ["int8"]), lambda: make("llama").to("meta")], ids=["int8", "meta"])
def test_a_base_that_is_not_dense_is_not_saved_as_a_whole(model, tmp_path):
    model = model()
    with pytest.raises(TightfitError, match="cannot be saved as a whole") as fault:
        save_adapter(model, {}, tmp_path, FACTS)
    assert fault.value.hint and not list(tmp_path.iterdir())


def test_the_base_is_never_written_over(saved):
    before = {file.name: file.read_bytes() for file in saved("llama").iterdir()}
    with pytest.raises(TightfitError, match="holds the base itself"):
        save_adapter(make("llama"), {}, saved("llama"), FACTS, str(saved("llama")))
    assert {file.name: file.read_bytes() for file in saved("llama").iterdir()} == before


def test_it_is_held_against_the_base(saved, tmp_path):
    skeleton = describe(str(saved("llama")))
    facts = facts_of(skeleton)
    assert facts["base"] == str(saved("llama"))
    save_adapter(adapted(LORA), LORA, tmp_path / "out", facts)
    found = read_adapter(tmp_path / "out")
    check_adapter(found, skeleton)
    shutil.copytree(saved("llama"), tmp_path / "moved")
    check_adapter(found, describe(str(tmp_path / "moved")))
    stir(make("llama")).save_pretrained(tmp_path / "moved")
    with pytest.raises(TightfitError, match="the base changed since the adapter") as fault:
        check_adapter(found, describe(str(tmp_path / "moved")))
    assert facts["base"] in fault.value.hint
    with pytest.raises(TightfitError, match=r"is for a `LlamaForCausalLM`, and `.*` is a `Qwen3ForCausalLM`") as fault:
        check_adapter(found, describe(str(saved("qwen3"))))
    assert facts["base"] in fault.value.hint


class Killed(BaseException):
    """As if the process ended there."""


@functools.cache
def before_and_after(name):
    """The same model at two moments of its training."""
    techniques = {name: LORA[name]} if name else {}
    return techniques, adapted(techniques), stir(adapted(techniques))


@pytest.mark.parametrize("name", ["lora", ""], ids=["lora", "whole"])
@pytest.mark.parametrize(("call", "at"), [("fsync", 0), ("fsync", 1), ("fsync", 3), ("fsync", 4), *(("replace", at) for at in range(4))])
@pytest.mark.parametrize("fault", [Killed, OSError(28, "No space left on device")], ids=["killed", "full"])
def test_a_write_that_fails_leaves_each_file_whole(name, call, at, fault, tmp_path, monkeypatch):
    techniques, earlier, model = before_and_after(name)
    save_adapter(earlier, techniques, tmp_path, FACTS)
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    save_adapter(model, techniques, tmp_path / "new", FACTS | {"tuning": {}})
    new = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    shutil.rmtree(tmp_path / "new")
    real, calls = getattr(files.os, call), []

    def failing(*args):
        calls.append(args)
        if len(calls) > at:
            raise fault
        return real(*args)

    monkeypatch.setattr(files.os, call, failing)
    try:
        save_adapter(model, techniques, tmp_path, FACTS | {"tuning": {}})
    except (Killed, TightfitError):
        pass
    else:
        assert (call, at) == ("replace", 3)  # three files
    monkeypatch.undo()
    here = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert here.keys() == old.keys()
    assert all(here[name] in (old[name], new[name]) for name in here)
    read_adapter(tmp_path).state()


def foreign(folder: Path, **settings) -> torch.nn.Module:
    """A LoRA as PEFT makes and saves it."""
    torch.manual_seed(3)
    model = peft.get_peft_model(make("llama"), LoraConfig(init_lora_weights=False, **settings))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], ["self_attn.o_proj"], r".*layers\.[13]\.mlp\.(up|down)_proj", "all-linear", ["model.layers.2.mlp.up_proj"]],
    ids=str,
)
def test_a_lora_that_peft_made(targets, tmp_path):
    theirs = foreign(tmp_path, r=3, lora_alpha=5, lora_dropout=0.1, target_modules=targets)
    found = read_adapter(tmp_path)
    assert found.technique == "lora" and (found.settings["rank"], found.settings["alpha"], found.settings["dropout"]) == (3, 5, 0.1)
    ours = make("llama")
    check_adapter(found, describe(ours))
    load_adapter(ours, found)
    assert torch.equal(logits(ours.eval()), logits(theirs))
    assert not torch.equal(logits(ours), logits(make("llama")))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"use_rslora": True}, "use_rslora=True"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern="),
        ({"bias": "all"}, "bias=all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"layers_to_transform": [1]}, r"layers_to_transform=\[1\]"),
        ({"exclude_modules": ["k_proj"]}, "exclude_modules="),
    ],
)
def test_what_lora_cannot_do_is_named(settings, named, tmp_path):
    foreign(tmp_path, r=3, target_modules=["q_proj"], **settings)
    with pytest.raises(TightfitError, match=named) as fault:
        read_adapter(tmp_path)
    assert fault.value.hint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "of the type `IA3`"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights=pissa_niter_16"),
        ({"some_new_setting": 3}, "some_new_setting=3"),
        ({"r": "four"}, "not a config of a LoRA"),
        ({"target_modules": None}, "not a config of a LoRA"),
        ({"target_modules": [3]}, "not a config of a LoRA"),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
    ],
)
def test_configs_of_others(change, said, tmp_path):
    foreign(tmp_path, r=3, target_modules=["q_proj"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(TightfitError, match=said) as fault:
        read_adapter(tmp_path)
    assert fault.value.hint


def test_adapters_on_what_lora_leaves_alone(tmp_path):
    foreign(tmp_path / "words", r=3, target_modules=["embed_tokens"])
    with pytest.raises(TightfitError, match="embed_tokens"):
        read_adapter(tmp_path / "words")
    foreign(tmp_path / "head", r=3, target_modules=["q_proj", "lm_head"])
    with pytest.raises(TightfitError, match="lm_head"):
        read_adapter(tmp_path / "head")
    foreign(tmp_path / "more", r=3, lora_alpha=5, target_modules=["q_proj"])
    with pytest.raises(
        TightfitError, match=r"unknown tensor `base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight` and 5 more"
    ):
        load_adapter(tightfit.apply(make("llama"), ["lora:rank=3,alpha=5,where=layers.1.*q_proj"]), read_adapter(tmp_path / "more"))
    foreign(tmp_path / "pickle", r=3, target_modules=["q_proj"])
    (tmp_path / "pickle" / "adapter_model.safetensors").rename(tmp_path / "pickle" / "adapter_model.bin")
    with pytest.raises(TightfitError, match="is a pickle"):
        read_adapter(tmp_path / "pickle")


def spoil(folder: Path, name: str, how: str) -> None:
    file = folder / name
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "list":
        file.write_text("[1]")
    elif how == "bytes":
        file.write_bytes(b"\xff\xfe\x00{")
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | json.loads(how)))


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("adapter_model.safetensors", "missing", "`adapter_model.safetensors` is missing"),
        ("adapter_model.safetensors", "truncated", "is truncated"),
        ("adapter_model.safetensors", "empty", "is not a safetensors file"),
        ("adapter_config.json", "missing", "`adapter_config.json` is missing"),
        ("adapter_config.json", "truncated", "is not JSON"),
        ("adapter_config.json", "bytes", "is not JSON"),
        ("tightfit.json", "truncated", "is not JSON"),
        ("tightfit.json", "empty", "is not JSON"),
        ("tightfit.json", "list", "is not a JSON object"),
        ("tightfit.json", '{"format": 2}', "newer tightfit"),
        ("tightfit.json", '{"format": "one"}', "not a note of tightfit"),
        ("tightfit.json", '{"settings": 4}', "not a note of tightfit"),
        ("tightfit.json", '{"technique": "laura"}', "no technique is called `laura`"),
        ("tightfit.json", '{"technique": "int8", "settings": {}}', "`int8` learns nothing"),
        ("tightfit.json", '{"settings": {"width": 4}}', "`lora` has no setting `width`"),
    ],
)
def test_what_is_damaged_is_one_clear_line(name, how, said, tmp_path):
    save_adapter(before_and_after("lora")[1], LORA, tmp_path, FACTS)
    spoil(tmp_path, name, how)
    with pytest.raises(TightfitError, match=said) as fault:
        read_adapter(tmp_path)
    assert fault.value.hint and "\n" not in str(fault.value)


@pytest.mark.parametrize("place", ["", "nowhere", "file"])
def test_a_place_without_an_adapter(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TightfitError, match=r"no folder|holds no adapter") as fault:
        read_adapter(tmp_path / place)
    assert fault.value.hint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop(min(state)), "lacks the tensor `base_model"),
        (lambda state: state.update({min(state): state[min(state)][:, :3].clone()}), r"has shape \[4, 3\] in place of"),
        (lambda state: state[max(state)].fill_(torch.inf), "holds NaN or infinite"),
    ],
    ids=["lacking", "misshapen", "infinite"],
)
@pytest.mark.parametrize("techniques", [LORA, DYLORA], ids=["lora", "dylora"])
def test_tensors_that_do_not_fit_change_nothing(techniques, change, said, tmp_path):
    save_adapter(adapted(techniques), techniques, tmp_path, FACTS)
    state = load_file(tmp_path / "adapter_model.safetensors")
    change(state)
    save_file(state, tmp_path / "adapter_model.safetensors")
    other = adapted(techniques)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(TightfitError, match=said) as fault:
        load_adapter(other, read_adapter(tmp_path))
    assert fault.value.hint and alike(other.state_dict(), before)


def test_an_adapter_of_other_settings(tmp_path):
    save_adapter(adapted(LORA), LORA, tmp_path, FACTS)
    found, (technique, *_) = read_adapter(tmp_path), [catalog.make("lora", {"rank": 4, "alpha": 8.0})]
    model = tightfit.apply(make("llama"), ["lora:rank=4,alpha=8"])
    with pytest.raises(TightfitError, match=r"lora_alpha 12\.0 in place of 8\.0"):
        technique.load_learned(model, found.config, found.state())


def test_a_tensor_file_is_what_safetensors_writes(tmp_path):
    numbers = torch.Generator().manual_seed(0)
    tensors = {
        "scalar": torch.tensor(2.5),
        "odd": torch.randint(0, 9, (3,), generator=numbers, dtype=torch.uint8),
        "bfloat16": torch.randn(3, 5, generator=numbers).bfloat16(),
        "turned": torch.randn(4, 6, generator=numbers).T,
        "none": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
        "whole": torch.arange(5),
    }
    files.write_tensors(tmp_path / "ours.safetensors", tensors)
    found = load_file(tmp_path / "ours.safetensors")
    assert alike(found, tensors) and all(found[name].dtype == tensors[name].dtype for name in tensors)
