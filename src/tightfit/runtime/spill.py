"""Spill: one nameless file for blocks that rest on disk in another form than they are stored. It is gone when the run ends."""

import os
import tempfile
from typing import BinaryIO

from torch import nn

from tightfit.formats.image import BlockImage, file_fault, write_image
from tightfit.terms.budget import spill_folder
from tightfit.terms.errors import TightfitError


class Spill:
    """Opened at the first block that is written and unlinked at once, so that not even a killed run leaves it behind."""

    def __init__(self) -> None:
        self.end = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> "Spill":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, block: nn.Module, image: BlockImage) -> BlockImage:
        """Append `block`; returns its image with the segment that reads it back."""
        if self._file is None:
            self._file = self._open()
        try:
            written = write_image(block, image, self._file, self.end)
        except TightfitError as error:  # the file has no name, so the folder is told
            raise TightfitError(str(error).replace(self._file.name, str(spill_folder())), hint=error.hint) from error
        self.end += written.segments[0].length
        return written

    def close(self) -> None:
        """Give the disk space back. Safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        try:
            descriptor, name = tempfile.mkstemp(prefix="tightfit-", suffix=".spill", dir=spill_folder())
        except OSError as fault:
            error = file_fault("written", str(spill_folder()), fault)
            raise TightfitError(str(error), hint="name another folder with `TIGHTFIT_SPILL`") from fault
        os.unlink(name)
        return open(f"/proc/self/fd/{descriptor}", "r+b", opener=lambda *_: descriptor)  # readers open it by this path
