"""Presets: `config.json` files of well-known models, so that planning works offline. A name is a file; a folder has weights too."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def presets() -> dict[str, Path]:
    """Every preset by name: its JSON file, or the folder that holds config, weights and tokenizer."""
    files = {path.stem: path for path in _FOLDER.glob("*.json")}
    return dict(sorted((files | {path.parent.name: path.parent for path in _FOLDER.glob("*/config.json")}).items()))
