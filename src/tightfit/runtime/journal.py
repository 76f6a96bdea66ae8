"""Journal: one JSON object a step in `log.jsonl`, and the same to accelerate's trackers.

A resumed run drops what came after its checkpoint.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator

FILE = "log.jsonl"


class Journal:
    """Open for the time of a run. Only the main process writes."""

    def __init__(self, folder: Path, accelerator: Accelerator, first: int) -> None:
        self.tokens = 0
        self.last_loss = math.nan
        self._accelerator = accelerator
        self._file = folder / FILE
        self._first = first
        self._stream: Any = None

    def __enter__(self) -> "Journal":
        if self._accelerator.is_main_process:
            kept = [line for line in read_journal(self._file) if line["step"] <= self._first] if self._first else []
            self.last_loss = next((line["loss"] for line in reversed(kept) if "loss" in line), math.nan)
            partial = self._file.with_suffix(f".{os.getpid()}.partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            partial.replace(self._file)
            self._stream = self._file.open("a")
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream:
            self._stream.close()
        self._accelerator.end_training()

    def step(self, step: int, **values: float) -> None:
        """After a step: what was seen, and the tokens that it learned from."""
        self.tokens += int(values["tokens"])
        self._write(step, values)

    def held_out(self, step: int, loss: float) -> float:
        """After an evaluation. Returns the loss."""
        self._write(step, {"held_out_loss": loss})
        return loss

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._stream:
            self._stream.write(json.dumps({"step": step, **values}) + "\n")
            self._stream.flush()
        self._accelerator.log(values, step=step)


def read_journal(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a last one that was cut short by a crash is passed over."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
