"""Export: plain PEFT LoRA folders that PEFT loads with the same outputs, or nothing at all."""

import json

import pytest
import torch
from families import ids, make
from peft import PeftModel
from safetensors.torch import load_file

import tightfit
from tightfit.runtime import export
from tightfit.runtime.adapters import save_adapter
from tightfit.runtime.export import export_peft
from tightfit.terms.errors import TightfitError

SETTINGS = {"lora": {"rank": 4, "alpha": 12.0}, "dylora": {"rank": 4, "alpha": 12.0}, "side": {"reduction": 4}}


def out(name, folder):
    """What a run of technique `name` leaves in `folder`, and its model."""
    techniques = {name: SETTINGS[name]} if name else {}
    model = tightfit.apply(make("llama"), techniques)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    save_adapter(model, techniques, folder, {"base": "some/base", "digest": "sha256:00"})
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids((2, 9), 384)).logits


def test_a_lora_is_what_it_was(tmp_path):
    model = out("lora", tmp_path / "out")
    for rank, name in ((None, "a"), (4, "b")):
        export_peft(tmp_path / "out", tmp_path / name, rank)
        assert {file.name for file in (tmp_path / name).iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
        loaded = PeftModel.from_pretrained(make("llama"), tmp_path / name)
        assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(loaded), logits(make("llama")))
    with pytest.raises(TightfitError, match="has rank 4, and cannot be cut to 2") as fault:
        export_peft(tmp_path / "out", tmp_path / "c", 2)
    assert "dylora" in fault.value.hint and not (tmp_path / "c").exists()


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_dylora_is_cut_to_a_rank(rank, tmp_path):
    """The sum of the paper by hand: `base(x) + alpha / rank · B[:, :rank] A[:rank] x`, merged into a plain model's weights."""
    model = out("dylora", tmp_path / "out")
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    export_peft(tmp_path / "out", tmp_path / "cut", rank)
    kept, merged = rank or 4, make("llama")
    with torch.no_grad():
        for name in {name.rpartition(".lora_")[0] for name in state}:
            a, b = (state[f"{name}.lora_{part}.weight"] for part in "AB")
            merged.get_submodule(name.removeprefix("base_model.model.")).weight += 12.0 / kept * b[:, :kept] @ a[:kept]
    loaded = PeftModel.from_pretrained(make("llama"), tmp_path / "cut")
    assert loaded.peft_config["default"].r == kept
    torch.testing.assert_close(logits(loaded), logits(merged), rtol=1e-4, atol=1e-5)
    if rank is None:
        assert torch.equal(logits(loaded), logits(model))
    else:
        assert not torch.allclose(logits(loaded), logits(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "rank", "said"),
    [("side", None, "PEFT has no adapter like that of `side`"), ("", None, "holds a whole model"), ("dylora", 5, "ranks 1 to 4")],
)
def test_what_cannot_be_exported(name, rank, said, tmp_path):
    out(name, tmp_path / "out")
    with pytest.raises(TightfitError, match=said) as fault:
        export_peft(tmp_path / "out", tmp_path / "cut", rank)
    assert fault.value.hint and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_written_over(tmp_path):
    out("lora", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file", "out"):
        with pytest.raises(TightfitError, match="is there already") as fault:
            export_peft(tmp_path / "out", tmp_path / name)
        assert fault.value.hint
    (tmp_path / "empty").mkdir()
    export_peft(tmp_path / "out", tmp_path / "empty")
    assert len(list((tmp_path / "empty").iterdir())) == 2
    with pytest.raises(TightfitError, match="cannot write"):
        export_peft(tmp_path / "out", tmp_path / "file" / "below")


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["stopped", "full"])
def test_a_fault_on_the_way_leaves_nothing(fault, tmp_path, monkeypatch):
    out("lora", tmp_path / "out")

    def failing(*_):
        raise fault

    monkeypatch.setattr(export, "write_json", failing)
    with pytest.raises((KeyboardInterrupt, OSError)):
        export_peft(tmp_path / "out", tmp_path / "cut")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
