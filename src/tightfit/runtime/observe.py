"""Observe: measure a run while it runs: tensor bytes on some passes, the process's memory always."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_iter

from tightfit.formats.notes import kernel_notes
from tightfit.rehearse.meter import Meter
from tightfit.runtime.build import Built
from tightfit.runtime.process import reset_peak, resident
from tightfit.runtime.spread import gpus_of
from tightfit.terms.errors import TightfitError
from tightfit.terms.footprint import total
from tightfit.terms.report import Report
from tightfit.terms.units import show_bytes

Forward = Callable[..., Any]


class Account:
    """What a run takes: the highest metered moment, the process by the kernel's count, torch's allocator on a GPU."""

    def __init__(self, built: Built) -> None:
        self.built = built
        self.peak: dict[str, int] = {}
        self.on_gpu = built.device.type == "cuda"
        self._load_peak = resident().peak
        self._gpus = gpus_of(built.plan) if self.on_gpu else []
        self._load_reserved = self._most(torch.cuda.max_memory_reserved)
        self._began = self._ended = 0.0

    def begin(self) -> None:
        """Running begins: loading's peaks are kept apart."""
        reset_peak()
        for number in self._gpus:
            torch.cuda.reset_peak_memory_stats(number)
        self._began = time.perf_counter()

    def end(self) -> None:
        """Running is over."""
        self._ended = time.perf_counter()

    def note(self, highest: Mapping[str, int]) -> None:
        """Keep these bytes by kind if they are more than any before."""
        if total(highest) > total(self.peak):
            self.peak = dict(highest)

    def weights(self) -> Iterable[torch.Tensor]:
        """The tensors that are there whatever runs."""
        yield from self.built.model.parameters()
        yield from self.built.model.buffers()
        if self.built.stream:
            yield from self.built.stream.memory()

    def refuse_overrun(self) -> None:
        """Stop rather than go on above the budget: whoever set it shares the machine with others."""
        budget = self.built.plan.budget
        held = [("the process", resident().total, "RAM", budget.ram)]
        if self.on_gpu:
            held.append(("torch's allocator", self._most(torch.cuda.memory_reserved), "GPU memory", budget.gpu))
        for who, size, memory, cap in held:
            if size > cap:
                raise TightfitError(
                    f"stopped: {who} holds {show_bytes(size)} of {memory}, its budget is {show_bytes(cap)}",
                    hint="`tightfit probe` measures this machine's overhead, then plans are exact",
                )

    def report(
        self,
        seconds: Mapping[str, float],
        tokens: int,
        complete: bool,
        text: str = "",
        notes: Iterable[str] = (),
        scores: Mapping[str, float] | None = None,
    ) -> Report:
        """What was seen, held against the plan."""
        now = resident()
        traffic = self.built.stream.traffic() if self.built.stream else None
        whole = {"whole": self._ended - self._began, "waited": traffic.seconds_waited if traffic else 0.0}
        return Report(
            plan=self.built.plan,
            measured=self._gpu_kinds() if self.on_gpu else self.peak,
            process={"load_peak": self._load_peak, "run_peak": now.peak, "anonymous": now.anonymous, "file": now.file},
            seconds={"load": self.built.load_seconds, **seconds, **whole},
            gpu=self._gpu_peaks() if self.on_gpu else {},
            moved_bytes=traffic.bytes_moved if traffic else 0,
            tokens=tokens,
            complete=complete,
            text=text,
            notes=(*kernel_notes(self.built.model), *notes),
            scores=scores or {},
        )

    def _gpu_kinds(self) -> dict[str, int]:
        """torch's allocator knows only the sum; weights are counted, the rest is what ran beside them. Of several GPUs the fullest."""
        number = self._gpus[self.built.plan.fullest_gpu]
        here = [tensor for tensor in self.weights() if tensor.is_cuda and number in (None, tensor.device.index)]
        held = sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in here}.values())
        return {"weights": held, "activations": max(0, torch.cuda.max_memory_allocated(number) - held)}

    def _gpu_peaks(self) -> dict[str, int]:
        """Of torch's allocator, while running and while loading; of several GPUs the most on any."""
        running = {"allocated": self._most(torch.cuda.max_memory_allocated), "reserved": self._most(torch.cuda.max_memory_reserved)}
        return running | {"load_reserved": self._load_reserved}

    def _most(self, size: Callable[[int | None], int]) -> int:
        """The most that `size` says of any GPU of the plan; 0 without one."""
        return max((size(number) for number in self._gpus), default=0)


class Observer:
    """Wraps the forward pass of the model, and that of its encoder, which `generate` calls by itself before the first pass.

    The meter costs some microseconds an operation, so on the CPU only some passes are metered: the encoder's, the first two
    (prompt, first token), each whose number is a power of two, and the last one that was planned.
    """

    def __init__(self, built: Built) -> None:
        self.built = built
        self.account = Account(built)
        self.passes = 0
        self.pass_seconds: list[float] = []
        self._last = max(1, built.plan.workload.new_tokens) if built.plan.workload.task == "generate" else 1
        self._longest = 0  # token ids that one pass was given
        self._encoder_seconds = 0.0
        self._wrapped: list[tuple[nn.Module, Forward]] = []

    @property
    def peak(self) -> dict[str, int]:
        """Bytes by kind at the highest metered moment."""
        return self.account.peak

    def __enter__(self) -> "Observer":
        self._wrap(self.built.model, self._pass)
        if self.built.model.config.is_encoder_decoder:
            self._wrap(self.built.model.get_encoder(), self._encoder_pass)
        self.account.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.account.end()
        for module, forward in self._wrapped:
            module.forward = forward

    def report(self, tokens: int, text: str = "") -> Report:
        """What was seen, held against the plan."""
        later = self.pass_seconds[1:] or self.pass_seconds
        seconds = {
            "first_token": self.pass_seconds[0] if self.pass_seconds else 0.0,
            "per_token": statistics.median(later) if later else 0.0,
        }
        return self.account.report(seconds, tokens, self._is_complete(), text)

    def _wrap(self, module: nn.Module, observed: Callable[[Forward, Any, Any], Any]) -> None:
        forward = module.forward

        @wraps(forward)  # `generate` reads the signature, and would ask for the logits of the whole prompt without it
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return observed(forward, args, kwargs)

        self._wrapped.append((module, forward))
        module.forward = wrapper

    def _pass(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        began = time.perf_counter()
        number = self.passes = self.passes + 1
        result = self._run(forward, args, kwargs, number <= 2 or number == self._last or number & (number - 1) == 0)
        self.pass_seconds.append(time.perf_counter() - began + self._encoder_seconds)
        self._encoder_seconds = 0.0
        return result

    def _encoder_pass(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        """Its time counts to the first token's."""
        began = time.perf_counter()
        result = self._run(forward, args, kwargs, metered=True)
        self._encoder_seconds = time.perf_counter() - began
        return result

    def _run(self, forward: Forward, args: Any, kwargs: Any, metered: bool) -> Any:
        ids = kwargs.get("input_ids")
        self._longest = max(self._longest, 0 if ids is None else ids.numel())
        result = self._metered(forward, args, kwargs) if metered and not self.account.on_gpu else forward(*args, **kwargs)
        if self.account.on_gpu:
            torch.cuda.synchronize()
        self.account.refuse_overrun()
        return result

    def _metered(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        meter = Meter()
        meter.adopt(self.account.weights(), "weights")
        meter.adopt(tree_iter(kwargs.get("encoder_outputs")), "activations")
        cache = kwargs.get("past_key_values")
        meter.adopt(_cached(cache), "kv_cache")
        with meter:
            result = forward(*args, **kwargs)
        highest = dict(meter.footprint().peak)
        grown = sum(tensor.numel() * tensor.element_size() for tensor in _cached(cache)) - highest.get("kv_cache", 0)
        moved = min(max(0, grown), highest.get("activations", 0))  # what the cache took during this pass was counted as activations
        highest["kv_cache"] = highest.get("kv_cache", 0) + moved
        highest["activations"] = highest.get("activations", 0) - moved
        self.account.note(highest)
        return result

    def _is_complete(self) -> bool:
        """Whether as much ran as the plan foresaw: its passes, and one of them over as many tokens (a prompt may be shorter)."""
        work = self.built.plan.workload
        return self.passes >= self._last and self._longest >= work.rows * work.tokens


def _cached(cache: Any) -> list[torch.Tensor]:
    if cache is None:
        return []
    parts = [vars(cache)[name] for name in ("self_attention_cache", "cross_attention_cache") if name in vars(cache)] or [cache]
    return [tensor for part in parts for layer in part.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
