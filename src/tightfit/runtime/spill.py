"""Spill: one nameless file for blocks that rest on disk in another form than they are stored. It is gone when the run ends."""

import os
import tempfile
from pathlib import Path
from typing import BinaryIO

from torch import nn

from tightfit.formats.image import BlockImage, file_fault, write_image
from tightfit.terms.disk import spill_folder
from tightfit.terms.errors import TightfitError


class Spill:
    """Opened at the first block that is written and unlinked at once, so that not even a killed run leaves it behind."""

    def __init__(self) -> None:
        self.end = 0
        self._file: BinaryIO | None = None
        self._folder = Path()

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
            raise TightfitError(str(error).replace(self._file.name, str(self._folder)), hint=error.hint) from error
        self.end += written.segments[0].length
        return written

    def close(self) -> None:
        """Give the disk space back. Safe to call twice."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        self._folder = spill_folder()
        try:
            descriptor, name = tempfile.mkstemp(prefix="tightfit-", suffix=".spill", dir=self._folder)
        except OSError as fault:
            raise folder_fault(self._folder, fault) from fault
        os.unlink(name)
        return open(f"/proc/self/fd/{descriptor}", "r+b", opener=lambda *_: descriptor)  # readers open it by this path


def folder_fault(folder: Path, fault: OSError) -> TightfitError:
    """The line for a person when the spill folder cannot be written."""
    return TightfitError(str(file_fault("written", str(folder), fault)), hint="name another folder with `TIGHTFIT_SPILL`")
