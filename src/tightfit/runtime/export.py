"""Export: turn what a run wrote into a folder that other tools read. The base is not loaded."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tightfit.runtime.adapters import Adapter, read_adapter
from tightfit.runtime.files import settle, write_json, write_tensors
from tightfit.terms.errors import TightfitError


def export_peft(folder: str | Path, out: str | Path, rank: int | None = None) -> None:
    """Write the adapter that lies in `folder` to `out` as a plain PEFT LoRA.

    `rank` cuts one that was tuned by `dylora`; None for its largest. Raises `TightfitError` for what is no LoRA, for another rank
    of a plain one, and for an `out` that holds something.
    """
    adapter = read_adapter(folder)
    config, state = dict(adapter.config), adapter.state()
    if adapter.technique == "dylora":
        from tightfit.techniques.dylora import truncated

        config, state = truncated(config, state, config["r"] if rank is None else rank)
    elif adapter.technique != "lora":
        _refuse(adapter)
    elif rank not in (None, config["r"]):
        raise TightfitError(
            f"the adapter in `{folder}` has rank {config['r']}, and cannot be cut to {rank}",
            hint="tune with `dylora`, which serves every rank",
        )
    with new_folder(Path(out)) as made:
        write_tensors(made / "adapter_model.safetensors", state)
        write_json(made / "adapter_config.json", config)


def _refuse(adapter: Adapter) -> None:
    if not adapter.technique:
        raise TightfitError(
            f"`{adapter.folder}` holds a whole model and no adapter", hint="`from_pretrained` loads it as it is; nothing is to be exported"
        )
    raise TightfitError(
        f"PEFT has no adapter like that of `{adapter.technique}` in `{adapter.folder}`",
        hint="tightfit runs it; tune `lora` for other tools",
    )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` once all is written into it; after a fault there is none. Raises for an `out` that holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TightfitError(f"`{out}` is there already", hint="name a new folder, or empty this one")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise TightfitError(f"cannot write `{out}`: {error.strerror}", hint="name a folder that may be written to") from error
    try:
        made.chmod(0o755)
        yield made
        os.rename(made, out)
        settle(out.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)
