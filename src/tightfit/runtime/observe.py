"""Observe: measure a run while it runs: tensor bytes on some passes, the process's memory always."""

import statistics
import time
from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch

from tightfit.rehearse.meter import Meter
from tightfit.runtime.build import Built
from tightfit.runtime.process import reset_peak, resident
from tightfit.terms.errors import TightfitError
from tightfit.terms.footprint import total
from tightfit.terms.report import Report
from tightfit.terms.units import show_bytes


class Observer:
    """Wraps the model's forward pass. The meter costs some microseconds an operation, so on the CPU only some passes are metered:
    the first two (prompt, first token), each whose number is a power of two, and the last one that was planned.
    """

    def __init__(self, built: Built) -> None:
        self.built = built
        self.passes = 0
        self.pass_seconds: list[float] = []
        self.peak: dict[str, int] = {}
        self._last = max(1, built.plan.workload.new_tokens)
        self._forward = built.model.forward
        self._load_peak = resident().peak

    def __enter__(self) -> "Observer":
        reset_peak()
        if self.built.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

        @wraps(self._forward)  # `generate` reads the signature, and would ask for the logits of the whole prompt without it
        def observed(*args: Any, **kwargs: Any) -> Any:
            return self._observed(*args, **kwargs)

        self.built.model.forward = observed
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.whole = time.perf_counter() - self._began
        self.built.model.forward = self._forward

    def report(self, tokens: int, text: str = "") -> Report:
        """What was seen, held against the plan."""
        now = resident()
        traffic = self.built.stream.traffic() if self.built.stream else None
        later = self.pass_seconds[1:] or self.pass_seconds
        return Report(
            plan=self.built.plan,
            measured=self.peak if not self._on_gpu() else self._gpu_kinds(),
            process={"load_peak": self._load_peak, "run_peak": now.peak, "anonymous": now.anonymous, "file": now.file},
            seconds={
                "load": self.built.load_seconds,
                "first_token": self.pass_seconds[0] if self.pass_seconds else 0.0,
                "per_token": statistics.median(later) if later else 0.0,
                "whole": self.whole,
                "waited": traffic.seconds_waited if traffic else 0.0,
            },
            gpu={"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()} if self._on_gpu() else {},
            moved_bytes=traffic.bytes_moved if traffic else 0,
            tokens=tokens,
            complete=self.passes >= self._last,
            text=text,
        )

    def _observed(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        number = self.passes = self.passes + 1
        if not self._on_gpu() and (number <= 2 or number == self._last or number & (number - 1) == 0):
            result = self._metered(args, kwargs)
        else:
            result = self._forward(*args, **kwargs)
        if self._on_gpu():
            torch.cuda.synchronize()
        self._refuse_overrun()
        self.pass_seconds.append(time.perf_counter() - began)
        return result

    def _metered(self, args: Any, kwargs: Any) -> Any:
        meter = Meter()
        meter.adopt(self._weights(), "weights")
        cache = kwargs.get("past_key_values")
        meter.adopt(_cached(cache), "kv_cache")
        with meter:
            result = self._forward(*args, **kwargs)
        highest = dict(meter.footprint().peak)
        grown = sum(tensor.numel() * tensor.element_size() for tensor in _cached(cache)) - highest.get("kv_cache", 0)
        moved = min(max(0, grown), highest.get("activations", 0))  # what the cache took during this pass was counted as activations
        highest["kv_cache"] = highest.get("kv_cache", 0) + moved
        highest["activations"] = highest.get("activations", 0) - moved
        if total(highest) > total(self.peak):
            self.peak = highest
        return result

    def _weights(self) -> Iterable[torch.Tensor]:
        yield from self.built.model.parameters()
        yield from self.built.model.buffers()
        if self.built.stream:
            yield from self.built.stream.memory()

    def _gpu_kinds(self) -> dict[str, int]:
        """torch's allocator knows only the sum; weights are counted, the rest is what ran beside them."""
        weights = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in self._weights() if tensor.is_cuda}
        held = sum(weights.values())
        return {"weights": held, "activations": max(0, torch.cuda.max_memory_allocated() - held)}

    def _on_gpu(self) -> bool:
        return self.built.device.type == "cuda"

    def _refuse_overrun(self) -> None:
        """Stop rather than go on above the budget: whoever set it shares the machine with others."""
        held, cap = resident().total, self.built.plan.budget.ram
        if held > cap:
            raise TightfitError(
                f"stopped: the process holds {show_bytes(held)} of RAM, its budget is {show_bytes(cap)}",
                hint="`tightfit probe` measures this machine's overhead, then plans are exact",
            )


def _cached(cache: Any) -> list[torch.Tensor]:
    if cache is None:
        return []
    parts = [vars(cache)[name] for name in ("self_attention_cache", "cross_attention_cache") if name in vars(cache)] or [cache]
    return [tensor for part in parts for layer in part.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
