"""Stages: one after the other they are the whole model, forward and backward, in one process and as a pipeline over two."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import CONFIGS, make

from tightfit.describe.blocks import blocks_of
from tightfit.runtime.stages import Stage, stages_of
from tightfit.terms.errors import TightfitError

FAMILIES = [family for family in CONFIGS if family not in ("t5", "vit")]
IDS = torch.randint(1, 384, (2, 12), generator=torch.Generator().manual_seed(3))


def cut(family: str, *ends: int) -> list[Stage]:
    """Stages of copies of one model, as processes would hold them."""
    return [Stage(make(family).eval(), first, last) for first, last in zip((0, *ends), (*ends, 4), strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_give_what_the_model_gives_forward_and_backward(family: str) -> None:
    model, stages = make(family).eval(), cut(family, 1, 3)
    expected = model(input_ids=IDS)[0]
    found = IDS
    for stage in stages:
        found = stage(found)
    assert torch.equal(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    gradients = {id(parameter): torch.zeros_like(parameter) for parameter in model.parameters()}
    for stage in stages:
        for name, parameter in stage.model.named_parameters():
            if parameter.grad is not None:
                gradients[id(model.get_parameter(name))] += parameter.grad  # a tied one stands on two stages
    for name, parameter in model.named_parameters():
        close = torch.allclose(gradients[id(parameter)], parameter.grad, rtol=1e-5, atol=1e-6 * float(parameter.grad.abs().max()))
        assert close, name


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_a_stage_holds_its_own_weights_only(family: str) -> None:
    model, middle = make(family), cut(family, 1, 3)[1]
    inside = sum(parameter.numel() for _, block in blocks_of(model) for parameter in block.parameters())
    outside = sum(parameter.numel() for parameter in model.parameters()) - inside
    vocabulary = {module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    expected = inside // 2 + outside - sum(weight.numel() for weight in vocabulary)
    assert sum(parameter.numel() for parameter in middle.parameters()) == expected


@pytest.mark.parametrize("ends", [(0, 0), (2, 1), (0, 5), (-1, 2)])
def test_a_stage_has_blocks_of_the_model(ends: tuple[int, int]) -> None:
    with pytest.raises(TightfitError, match="no stage of the blocks"):
        Stage(make("llama"), *ends)


def test_a_model_of_two_stacks_is_refused() -> None:
    with pytest.raises(TightfitError, match="has 2 stacks"):
        Stage(make("t5"), 0, 2)


def test_stages_of_devices() -> None:
    assert stages_of([1, 1, 0, 2, 2]) == [(1, range(0, 2)), (0, range(2, 3)), (2, range(3, 5))]
    with pytest.raises(TightfitError, match="device 0 has blocks before and after"):
        stages_of([0, 1, 0])


PIPELINE = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
sys.path.insert(0, sys.argv[1])
from families import make
from torch import nn
from tightfit.runtime.stages import Stage

dist.init_process_group("gloo")
rank, ids = dist.get_rank(), torch.randint(1, 384, (4, 12), generator=torch.Generator().manual_seed(3))
loss = lambda logits, target: nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
whole, part = make("llama").eval(), Stage(make("llama").eval(), *((0, 3), (3, 4))[rank])
schedule = ScheduleGPipe(PipelineStage(part, rank, 2, torch.device("cpu")), 2, loss_fn=loss)
output = schedule.step(ids) if rank == 0 else schedule.step(target=ids)
expected = whole(input_ids=ids)[0]
loss(expected, ids).backward()
assert rank == 0 or torch.allclose(output, expected, atol=1e-6)
for name, parameter in part.model.named_parameters():
    if parameter.grad is not None:
        assert torch.allclose(parameter.grad, whole.get_parameter(name).grad, atol=1e-6), name
sys.stdout.write(f"learned {sum(p.grad is not None for p in part.parameters())}\\n")  # at one go: both processes write into one pipe
dist.destroy_process_group()
"""


def test_two_processes_give_the_outputs_and_gradients_of_one(tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text(PIPELINE)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    said = subprocess.run([*launch, tmp_path / "pipeline.py", Path(__file__).parents[1]], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-3000:]
    learned = sorted(int(line.split()[1]) for line in said.stdout.splitlines() if line.startswith("learned"))
    assert learned == sorted([1 + 3 * 9, 9 + 2])
