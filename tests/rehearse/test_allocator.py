"""The allocator's peak counts what the work does, and nothing of what was left by earlier work."""

import gc

import torch

from tightfit.rehearse.allocator import allocator_peak


class Ring:
    """Memory that only the cycle collector frees."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.self = tensor, self


def test_the_highest_moment_counts() -> None:
    def work() -> torch.Tensor:
        torch.zeros(3000)
        return torch.zeros(1000) + torch.zeros(1000)

    assert allocator_peak(work) == 12000


def test_garbage_of_an_earlier_record_is_not_taken_off_this_one() -> None:
    def work() -> torch.Tensor:
        gc.collect()
        return torch.zeros(500_000)

    gc.disable()
    try:
        allocator_peak(lambda: Ring(torch.zeros(250_000)) and None)
        assert allocator_peak(work) == 2_000_000
    finally:
        gc.enable()
