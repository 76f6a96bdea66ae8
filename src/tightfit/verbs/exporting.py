"""The verb of exporting: what `tune` or `quantize` wrote, as the files of another program. It only finds out what lies in the folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tightfit.runtime.adapters import NOTE
from tightfit.runtime.export import export_peft
from tightfit.runtime.export_formats import FORMATS
from tightfit.runtime.export_model import export_model
from tightfit.terms.errors import TightfitError, near

PEFT = "peft"

TARGETS = (PEFT, *FORMATS)
"""What can be written: a LoRA for PEFT, or a quantized model for other programs."""


def export(
    folder: str,
    out: str,
    to: str = "",
    rank: int | None = None,
    progress: Callable[[int, int, str], None] = lambda done, whole, name: None,
) -> dict[str, Any]:
    """Write what lies in `folder` to the new folder `out`, `to` one of `TARGETS`; empty: `peft` for an adapter, else compressed-tensors.

    `rank` cuts an adapter that was tuned by `dylora`. Returns what was written, for a person or as JSON. Raises `TightfitError`, and
    leaves nothing behind, where the format cannot hold it.
    """
    if to and to not in TARGETS:
        raise TightfitError(f"no format is called `{to}`", hint=near(to, TARGETS))
    if not Path(folder).is_dir():
        raise TightfitError(f"there is no folder `{folder}`", hint="name one that `tightfit tune` or `tightfit quantize` wrote")
    tuned = any((Path(folder) / name).exists() for name in (NOTE, "adapter_config.json"))
    is_model = not tuned and (Path(folder) / "config.json").exists()
    to = to or ("compressed-tensors" if is_model else PEFT)
    if to == PEFT:
        if is_model:
            raise TightfitError(f"`{folder}` holds a model and no adapter", hint=f"`--to {'` or `--to '.join(FORMATS)}` is for models")
        export_peft(folder, out, rank)
        return {"adapter": str(Path(out)), "format": to, "rank": rank}
    if tuned:
        raise TightfitError(f"`{folder}` holds what was tuned, and `{to}` is for quantized models", hint="`--to peft` is for adapters")
    if rank is not None:
        raise TightfitError("`--rank` cuts an adapter, and this is a model", hint="leave it out")
    return {"model": str(Path(out)), "format": to, "bytes": export_model(folder, out, to, progress)}
