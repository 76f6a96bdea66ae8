"""Device maps: accelerate takes them, every parameter has the device of the operator that reads it, and they are short."""

import pytest
import torch
from accelerate.utils import check_device_map
from families import make

from tightfit.planner.placement.device_map import device_map
from tightfit.rehearse.capture import capture


def captured(family):
    return capture(make(family).to("meta"), {"input_ids": torch.ones(1, 8, dtype=torch.long)}, grain="block")


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "bloom", "opt", "bert", "gpt-neox"])
def test_accelerate_takes_it(family):
    found = captured(family)
    homes = {name: number % 3 for number, name in enumerate(dict.fromkeys(op.group or op.name for op in found.graph.operators))}
    device_of = [homes[operator.group or operator.name] for operator in found.graph.operators]
    told = device_map(found, device_of)
    model = make(family)
    check_device_map(model, told)
    assert set(told.values()) == {0, 1, 2}
    for name, _ in model.named_parameters():
        assert any(name.startswith(f"{path}.") for path in told), name
    blocks = [path for path in told if path.split(".")[-1].isdigit()]
    assert len(blocks) == 4  # whole, each by one name


def test_one_device_is_one_entry():
    found = captured("llama")
    assert device_map(found, [1] * len(found.graph.operators)) == {"": 1}


def test_two_halves_are_told_by_their_blocks():
    found = captured("llama")
    names = [operator.name for operator in found.graph.operators]
    late = names.index("model.layers.2")
    told = device_map(found, [int(number >= late) for number in range(len(names))])
    assert told["model.layers.1"] == told["model.embed_tokens"] == 0
    assert told["model.layers.2"] == told["lm_head"] == told["model.norm"] == 1
