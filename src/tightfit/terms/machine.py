"""Machine: the rates and overheads of this computer, measured once by `tightfit probe` and kept in a small file."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tightfit.terms.errors import TightfitError
from tightfit.terms.restore import restore
from tightfit.terms.units import MIB


@dataclass(frozen=True)
class Machine:
    """What the planner must know of a computer. Rates are per second; the defaults are cautious guesses for an unprobed one."""

    probed: bool = False
    device: str = "cpu"
    flops: float = 60e9  # dense bfloat16 products, all threads
    memory_bandwidth: float = 10e9  # bytes that one pass over weights reads
    gpu_flops: float = 60e12
    gpu_bandwidth: float = 500e9
    disk_bandwidth: float = 0.8e9  # direct reads of the spill folder's disk, cold
    link_bandwidth: float = 10e9  # pinned RAM to GPU
    encode_bandwidth: Mapping[str, float] = field(default_factory=dict)  # dense bytes that a quantization takes in, by its name
    operation_seconds: float = 8e-6  # Python and dispatch, each operation
    overhead_ram: int = 500 * MIB  # interpreter, torch, transformers, tokenizer, scratch of kernels
    overhead_gpu: int = 600 * MIB  # CUDA context and libraries
    overhead_bitsandbytes: int = 60 * MIB  # its library, once a technique loads it
    overhead_peft: int = 220 * MIB  # PEFT with what it imports, bitsandbytes among it, once an adapter loads it
    overhead_routing: int = 128 * MIB  # kernels and scratch for ever new numbers of tokens, where experts are chosen
    overhead_routing_tune: int = 300 * MIB  # the same with a backward pass
    overhead_beside: int = 32 * MIB  # kernels for the shapes of a network that is tuned beside the model
    allocator_slack: float = 0.02  # share of the tensors' bytes lost to rounding and fragmentation
    version: str = ""

    @classmethod
    def here(cls) -> "Machine":
        """The probed machine from its file, or the cautious defaults where `tightfit probe` never ran."""
        file = machine_file()
        if not file.exists():
            return cls()
        try:
            machine = restore(cls, json.loads(file.read_text()))
            if min(machine.rates) <= 0 or min(value for value in vars(machine).values() if isinstance(value, int | float)) < 0:
                raise ValueError("a rate or an overhead below zero")
            return machine
        except OSError as error:
            raise TightfitError(f"cannot read `{file}`: {error.strerror}", hint="name another folder with `TIGHTFIT_HOME`") from error
        except (ValueError, TypeError) as error:
            raise TightfitError(f"`{file}` is damaged", hint="run `tightfit probe` again, or remove the file") from error

    def save(self) -> Path:
        """Write the file; atomically, so that a reader never sees half of it."""
        file = machine_file()
        partial = file.with_suffix(f".{os.getpid()}.partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(asdict(self), indent=1))
            partial.replace(file)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise TightfitError(f"cannot write `{file}`: {error.strerror}", hint="name another folder with `TIGHTFIT_HOME`") from error
        return file

    @property
    def rates(self) -> tuple[float, ...]:
        """All rates, bytes or operations per second."""
        fixed = (self.flops, self.memory_bandwidth, self.gpu_flops, self.gpu_bandwidth, self.disk_bandwidth, self.link_bandwidth)
        return (*fixed, *self.encode_bandwidth.values())

    def encode_seconds(self, dense_bytes: int, names: Iterable[str]) -> float:
        """How long the techniques among `names` that were probed take to encode `dense_bytes`."""
        return sum(dense_bytes / self.encode_bandwidth[name] for name in names if name in self.encode_bandwidth)

    def overhead(self, tier: str, tensor_bytes: int, extras: frozenset[str] = frozenset()) -> int:
        """Bytes of `tier` that no tensor shows, for a run whose tensors hold `tensor_bytes` there.

        `extras` are what not every run has: the libraries `bitsandbytes` and `peft`, which loads it too, `routing` or
        `routing_tune` to experts, and what is tuned `beside` the model.
        """
        fixed = self.overhead_gpu if tier == "gpu" else self.overhead_ram
        if tier == "ram":
            seldom = {
                "bitsandbytes": 0 if "peft" in extras else self.overhead_bitsandbytes,
                "peft": self.overhead_peft,
                "routing": self.overhead_routing,
                "routing_tune": self.overhead_routing_tune,
                "beside": self.overhead_beside,
            }
            fixed += sum(seldom[name] for name in extras)
        return fixed + int(self.allocator_slack * tensor_bytes)


def machine_file() -> Path:
    """Where the probe's result is kept: `TIGHTFIT_HOME`, else `~/.cache/tightfit`."""
    home = os.environ.get("TIGHTFIT_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tightfit"
    return Path(home) / "machine.json"
