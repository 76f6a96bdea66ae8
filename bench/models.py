"""Models: the folders and files of the peers' shapes, written where they are not there yet."""

import os
import subprocess
import sys
from pathlib import Path

from record import BENCH, cache_folder, say

PEERS = BENCH / "peers"
MODELS = cache_folder() / "models"
LLAMA_CPP = cache_folder() / "llama.cpp"


def ensure_model(shape: str, models: Path) -> Path:
    """The folder of a shape with random bfloat16 weights."""
    folder = models / shape
    if not (folder / "model.safetensors.index.json").exists():
        say(f"writing {folder}")
        command = [sys.executable, str(PEERS / "make_model.py"), "--shape", shape, "--out", str(folder)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return folder


def ensure_gguf(shape: str, kind: str, models: Path, llama_cpp: Path) -> Path:
    """The same shape as a GGUF file; the package that writes it comes with llama.cpp's source."""
    file = models / f"{shape}-{kind}.gguf"
    if not file.exists():
        say(f"writing {file}")
        sources = [str(path) for path in llama_cpp.glob("llama_cpp_python-*/vendor/llama.cpp/gguf-py")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sources, os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, str(PEERS / "make_gguf.py"), "--shape", shape, "--type", kind, "--out", str(file)]
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    return file
