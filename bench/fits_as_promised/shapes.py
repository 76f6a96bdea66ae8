"""Shapes: write a shape of the settings as a Hugging Face folder with random weights, so that rows load real files.

`python shapes.py CONFIG.json FOLDER`. The weights mean nothing; the same shape gives the same bytes.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import transformers


def write_folder(values: dict, folder: Path) -> None:
    """Make the model of `values` on `meta`, fill it, and save it as transformers does; atomically."""
    config = transformers.AutoConfig.for_model(**values)
    model_class = getattr(transformers, config.architectures[0])
    with torch.device("meta"):
        model = model_class._from_config(config, dtype=getattr(torch, values["dtype"]))
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0, 0.02, generator=generator)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    (partial / "config.json").write_text(json.dumps(values, indent=1))
    partial.replace(folder)


if __name__ == "__main__":
    write_folder(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    print(json.dumps({"folder": sys.argv[2]}))
