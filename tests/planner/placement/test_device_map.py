"""Device maps: accelerate takes them, every parameter has the device of the operator that reads it, and they are short."""

import pytest
import torch
from accelerate.utils import check_device_map
from families import make

from tightfit.describe.skeleton import meta_copy
from tightfit.planner.placement.device_map import block_devices, device_map
from tightfit.rehearse.capture import capture


def captured(family, tied=True):
    module = meta_copy(make(family))
    ids = torch.ones(1, 8, dtype=torch.long)
    return capture(module, {"input_ids": ids}, grain="block", whole=module._no_split_modules or (), tied=tied)


def spread(found, count):
    """Groups in turn over `count` devices."""
    homes = {name: number % count for number, name in enumerate(dict.fromkeys(op.group or op.name for op in found.graph.operators))}
    return [homes[operator.group or operator.name] for operator in found.graph.operators]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "bloom", "opt", "bert", "gpt-neox"])
def test_accelerate_takes_it(family):
    found = captured(family)
    told = device_map(found, spread(found, 3))
    model = make(family)
    check_device_map(model, told)
    assert set(told.values()) == {0, 1, 2}
    for name, _ in model.named_parameters(remove_duplicate=False):
        assert any(name.startswith(f"{path}.") for path in told), name
    blocks = [path for path in told if path.split(".")[-1].isdigit()]
    assert len(blocks) == 4  # whole, each by one name


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt"])
def test_what_is_added_outside_of_the_blocks_lies_together(family):
    """Word and position embeddings are summed by the model's own code, which moves nothing."""
    found = captured(family)
    told = device_map(found, spread(found, 3))
    assert len({device for path, device in told.items() if "embed" in path or ".wte" in path or ".wpe" in path}) == 1


def test_a_tied_head_goes_with_its_embedding_or_there_is_no_map():
    found = captured("llama-tied")
    late = [int(operator.name == found.graph.operators[-1].name) for operator in found.graph.operators]
    assert found.graph.operators[-1].group  # bound to the embedding
    free = captured("llama-tied", tied=False)
    assert not free.graph.operators[-1].group
    assert device_map(free, late) is None
    assert device_map(free, [0] * len(late)) == {"": 0}
    extra = free.graph.weight_bytes - found.graph.weight_bytes
    assert extra == make("llama-tied").get_input_embeddings().weight.numel() * 4  # the head has a copy of its own


def test_one_device_is_one_entry():
    found = captured("llama")
    assert device_map(found, [1] * len(found.graph.operators)) == {"": 1}


def test_two_halves_are_told_by_their_blocks():
    found = captured("llama")
    names = [operator.name for operator in found.graph.operators]
    late = names.index("model.layers.2")
    device_of = [int(number >= late) for number in range(len(names))]
    told = device_map(found, device_of)
    assert told["model.layers.1"] == told["model.embed_tokens"] == 0
    assert told["model.layers.2"] == told["lm_head"] == told["model.norm"] == 1
    assert block_devices(found, device_of) == (0, 0, 1, 1)
