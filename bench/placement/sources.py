"""Sources: the graphs that are placed, of files and of models, each with the splits that others make of that graph alone."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import networks
from record import CHECKOUT
from splits import Split, accelerate_split, expert_split

from tightfit.data.graphs import read_graph
from tightfit.rehearse.capture import capture
from tightfit.rehearse.costs import priced
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph
from tightfit.terms.machine import Machine

GRAPHS = Path(os.environ.get("TIGHTFIT_DATA") or CHECKOUT.parent / "shared" / "data") / "graphs"
Splits = Callable[[Cluster], dict[str, Split]]


@dataclass(frozen=True)
class Source:
    """A graph by name, and the devices that its file says; recording a model's waits until somebody asks."""

    name: str
    load: Callable[[], tuple[Graph, Splits]]
    devices: int | None = None
    memory_bytes: int | None = None

    @property
    def graph(self) -> Graph:
        """What is placed."""
        return self._loaded[0]

    def splits(self, cluster: Cluster) -> dict[str, Split]:
        """What others make of this graph on `cluster`, by who they are; None where they make nothing of it."""
        return self._loaded[1](cluster)

    @cached_property
    def _loaded(self) -> tuple[Graph, Splits]:
        return self.load()


def sources(part: str, settings: Mapping[str, Any]) -> Iterator[Source]:
    """The graphs of a part, as `settings` lists them: files by pattern, then models."""
    for pattern in settings["graphs"][part]:
        for file in sorted(GRAPHS.glob(pattern)):
            yield _from_file(file)
    for name in settings["models"]:
        for training in (False, True):
            yield Source(f"{name}/{'training' if training else 'inference'}", partial(_of_model, name, training, part != "throughput"))


def _from_file(file: Path) -> Source:
    read = read_graph(str(file))

    def splits(cluster: Cluster) -> dict[str, Split]:
        """The experts split for six devices, of the memory that the file says."""
        own = len(cluster.devices) == read.devices and cluster.devices[0].memory_bytes == read.memory_bytes
        return {"expert": expert_split(file, read) if own and len(cluster.devices) >= 6 else None}

    name = file.name.removesuffix(".graph.txt").removesuffix(".json")
    return Source(f"{name}/{file.parent.name}", lambda: (read.graph, splits), read.devices, read.memory_bytes)


def _of_model(name: str, training: bool, tied: bool) -> tuple[Graph, Splits]:
    """Every operation is an operator, with the seconds of a GPU of 60 TFLOP/s and 500 GB/s. A pipeline's stages have a tied weight each."""
    module, inputs = vars(networks)[name](training=training)
    captured = capture(module, inputs, training, tied=tied)
    return priced(captured, Machine(), "gpu"), lambda cluster: {"accelerate": accelerate_split(module, captured, cluster)}
