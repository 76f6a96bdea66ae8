"""Clock: rehearsed work becomes seconds. It knows rates, not machines' names."""

from collections.abc import Mapping

from tightfit.terms.machine import Machine


def compute_seconds(work: Mapping[str, float], tier: str, machine: Machine) -> float:
    """The larger of products over the product rate and bytes over the memory rate, plus a fixed time for every operation."""
    if not work:
        return 0.0
    flops, bandwidth = (machine.gpu_flops, machine.gpu_bandwidth) if tier == "gpu" else (machine.flops, machine.memory_bandwidth)
    return max(work["flops"] / flops, work["bytes_touched"] / bandwidth) + work["operations"] * machine.operation_seconds
