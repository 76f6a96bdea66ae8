"""Hub: a Hugging Face id becomes a folder. To run a model its weights are fetched; to plan it their headers are enough."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tightfit.describe.checkpoint import INDEX, SINGLE, read_checkpoint, record_of
from tightfit.formats.image import TensorRecord
from tightfit.presets import presets
from tightfit.terms.errors import TightfitError, near

_WORDS = ["*.json", "tokenizer*", "*.model", "*.jinja", "*.txt"]


def hub_folder(name: str, weights: bool) -> Path:
    """The cached snapshot of `name`, fetched where it is not there yet unless `HF_HUB_OFFLINE` is set; without `weights` a few files."""
    from huggingface_hub import snapshot_download

    with _told_clearly(name):
        return Path(snapshot_download(name, allow_patterns=[*_WORDS, *(["*.safetensors"] if weights else [])]))


def read_hub(name: str, folder: Path) -> dict[str, TensorRecord]:
    """Every tensor of `name`: where it lies in `folder` if the weights were fetched before, else where it will lie.

    Of what is not here, the headers are asked for, some KiB a file. A tensor's place in its file is then known but for the header's length.
    """
    if _is_fetched(folder):
        return read_checkpoint(folder)
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        with _told_clearly(name):
            found = get_safetensors_metadata(name)
    except NotASafetensorsRepoError as error:
        raise TightfitError(
            f"`{name}` holds no safetensors weights", hint="look for a repository that does, or convert it with `save_pretrained`"
        ) from error
    records = {}
    for file, header in found.files_metadata.items():
        for tensor, info in header.tensors.items():
            if found.weight_map.get(tensor, file) == file:
                records[tensor] = record_of(folder / file, tensor, info.dtype, tuple(info.shape), tuple(info.data_offsets))
    return records


def _is_fetched(folder: Path) -> bool:
    if (folder / INDEX).exists():
        shards = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        return all((folder / shard).exists() for shard in shards)
    return (folder / SINGLE).exists()


@contextmanager
def _told_clearly(name: str) -> Iterator[None]:
    """What the hub's library says in many words, in one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError as error:
        raise TightfitError(f"no model is called `{name}`: not a folder, a preset or a hub id", hint=near(name, presets())) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        why = "the hub is switched off (`HF_HUB_OFFLINE`)" if isinstance(error, OfflineModeIsEnabled) else "the hub could not be asked"
        if isinstance(error, HfHubHTTPError):
            why = f"the hub answered {error.response.status_code}"
        raise TightfitError(
            f"`{name}` is not in the cache, and {why}", hint="check the name and the connection; presets (`tightfit list`) need none"
        ) from error
    except OSError as error:
        why = f"it cannot be written: {error.strerror}" if error.errno else "the hub could not be asked"
        raise TightfitError(f"`{name}` cannot be fetched: {why}", hint="`HF_HOME` names the folder of the cache") from error
