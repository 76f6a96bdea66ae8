"""Hub: planning asks for headers only, running fetches the weights; a hub of our own stands in for the one that is not here."""

import json
import shutil
from dataclasses import replace
from fnmatch import fnmatch

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError, OfflineModeIsEnabled
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata
from huggingface_hub.utils._safetensors import TensorInfo

from tightfit import verbs
from tightfit.describe.source import describe
from tightfit.terms.budget import Budget
from tightfit.terms.errors import TightfitError
from tightfit.terms.machine import Machine
from tightfit.terms.workload import Workload

NAME = "some-org/some-model"


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """A hub that holds one model; tells which files were fetched."""
    there, here = saved("llama"), tmp_path / "snapshot"
    here.mkdir()

    def snapshot_download(name, allow_patterns):
        for file in there.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, here)
        return str(here)

    def get_safetensors_metadata(name):
        raw = (there / "model.safetensors").read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        tensors = {key: TensorInfo(**entry) for key, entry in header.items() if key != "__metadata__"}
        weight_map = dict.fromkeys(tensors, "model.safetensors")
        return SafetensorsRepoMetadata(None, False, weight_map, {"model.safetensors": SafetensorsFileMetadata({}, tensors)})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", get_safetensors_metadata)
    return here


def test_a_plan_fetches_no_weights_and_a_run_does(hub, saved):
    question = (Workload(tokens=8, new_tokens=4), Budget(ram=1 << 40, disk=0))
    remote = verbs.plan(NAME, *question, machine=Machine())
    assert (hub / "config.json").exists() and not (hub / "model.safetensors").exists()
    assert remote == replace(verbs.plan(str(saved("llama")), *question, machine=Machine()), model=NAME)
    assert verbs.run(remote, "a b c").tokens == 4
    assert (hub / "model.safetensors").exists()
    assert verbs.plan(NAME, *question, machine=Machine()) == remote


def test_a_shape_of_the_hub_runs_without_its_weights(hub):
    described = describe(NAME, random_weights=True)
    assert not described.origins and not (hub / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (OfflineModeIsEnabled(), "is not in the cache, and the hub is switched off"),
        (HFValidationError(), "no model is called"),
        (OSError(28, "No space left on device"), "cannot be fetched: it cannot be written: No space left on device"),
        (ConnectionError("no route"), "the hub could not be asked"),
    ],
)
def test_what_goes_wrong_is_one_line(fault, said, hub, monkeypatch):
    def fails(*_words, **_more):
        raise fault

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(TightfitError, match=said) as caught:
        describe(NAME)
    assert caught.value.hint


def test_a_repository_of_pickles(hub, monkeypatch):
    def fails(_name):
        raise NotASafetensorsRepoError()

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", fails)
    with pytest.raises(TightfitError, match="holds no safetensors weights") as caught:
        describe(NAME, fetch=False)
    assert caught.value.hint


def test_the_hub_answers_with_a_number(hub, monkeypatch):
    class Answer:
        status_code, headers, request = 404, {}, None

    def fails(*_words, **_more):
        raise HfHubHTTPError("not found", response=Answer())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(TightfitError, match="the hub answered 404"):
        describe(NAME)
