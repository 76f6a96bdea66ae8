"""Graphs of operators from files: of msr-fiddle/dnn-partitioning (JSON), of PipeDream's profiler (text), and our own (JSON)."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tightfit.terms.errors import TightfitError, near
from tightfit.terms.graph import Graph, Operator

_NODE = re.compile(r"(?P<id>\S+) -- (?P<text>.*) -- (?P<costs>[a-z_]+=.*)")
_EDGE = re.compile(r"\s+(?P<source>\S+) -- (?P<target>\S+)")
_MOST_FAULTS = 5


@dataclass(frozen=True)
class GraphFile:
    """A graph, and what its file says about the devices; None where it says nothing."""

    graph: Graph
    ids: tuple[str, ...]  # what the file calls each operator
    devices: int | None = None
    memory_bytes: int | None = None


def read_graph(file: str) -> GraphFile:
    """The graph in `file`. Times in files of others are milliseconds; sizes are bytes.

    dnn-partitioning (NeurIPS 2020): times on an accelerator, `size` for good, `cost` of an edge is the time to send its source's output;
    one `colorClass` goes to one device. PipeDream (SOSP 2019): a training step; every layer becomes its forward and, on the same device,
    its backward, which reads the layer's input and output; weights and gradients stay for good.
    Raises `TightfitError` for a file that is none of these, and names what is missing or unsound in it.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TightfitError(f"cannot read `{file}`: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TightfitError(f"`{file}` is not text", hint="a graph is a JSON file, or a text file of PipeDream's profiler") from error
    if not text.lstrip().startswith(("{", "[")):
        return _pipedream(path, text)
    try:
        values = json.loads(text)
    except ValueError as error:
        raise TightfitError(f"`{file}` is not sound JSON: {error}") from error
    if not isinstance(values, dict) or not ({"nodes", "operators"} & set(values)):
        raise TightfitError(f"`{file}` holds no graph", hint="a graph has `nodes` and `edges`, or `operators` and `edges`")
    return _partitioning(path, values) if "nodes" in values else _own(path, values)


def graph_values(graph: Graph) -> dict[str, Any]:
    """The graph as our own JSON, which `read_graph` reads."""
    return {"name": graph.name, "operators": [asdict(operator) for operator in graph.operators], "edges": [list(e) for e in graph.edges]}


def _own(path: Path, values: Mapping[str, Any]) -> GraphFile:
    known = [entry.name for entry in fields(Operator)]
    operators, faults = [], []
    for number, given in enumerate(values["operators"]):
        strange = sorted(set(given) - set(known)) if isinstance(given, dict) else []
        if strange:
            raise TightfitError(f"`{path}`: operator {number} has an unknown `{strange[0]}`", hint=near(strange[0], known))
        faults += _missing(f"operator {number}", given, {"name": str, "seconds": float})
        faults += _unsound(f"operator {number}", given, ("seconds", "weight_bytes", "kept_bytes", "temporary_bytes", "output_bytes"))
        if not faults:
            operators.append(Operator(**given))
    _refuse(path, faults)
    edges = [_pair(path, number, edge) for number, edge in enumerate(values.get("edges", ()))]
    graph = Graph(str(values.get("name", path.stem)), tuple(operators), tuple(edges))
    return GraphFile(graph, tuple(operator.name for operator in operators))


def _pair(path: Path, number: int, edge: Any) -> tuple[int, int]:
    if not (isinstance(edge, list) and len(edge) == 2 and all(type(end) is int for end in edge)):
        raise TightfitError(f"`{path}`: edge {number} is not a pair of operators' numbers")
    return edge[0], edge[1]


def _partitioning(path: Path, values: Mapping[str, Any]) -> GraphFile:
    """msr-fiddle/dnn-partitioning: the README's format."""
    nodes, edges = values["nodes"], values.get("edges", [])
    faults = []
    for number, node in enumerate(nodes):
        place = f"node {node['id']}" if isinstance(node, dict) and "id" in node else f"node at place {number}"
        faults += _missing(place, node, {"id": int, "fpgaLatency": float, "size": float})
        faults += _unsound(place, node, ("fpgaLatency", "size"))
    for number, edge in enumerate(edges):
        faults += _missing(f"edge {number}", edge, {"sourceId": int, "destId": int, "cost": float})
        faults += _unsound(f"edge {number}", edge, ("cost",))
    _refuse(path, faults)
    numbers = {node["id"]: number for number, node in enumerate(nodes)}
    if len(numbers) < len(nodes):
        raise TightfitError(f"`{path}`: two nodes have one `id`")
    strangers = {edge[end] for edge in edges for end in ("sourceId", "destId")} - set(numbers)
    _refuse(path, [f"an edge names node {stranger}, which is not there" for stranger in sorted(strangers)])
    send: dict[int, float] = {}  # the README: the same for all edges of a source; where not, the dearest
    for edge in edges:
        send[edge["sourceId"]] = max(edge["cost"], send.get(edge["sourceId"], 0.0))
    operators = tuple(
        Operator(
            name=str(node.get("name", node["id"])),
            seconds=node["fpgaLatency"] / 1e3,
            weight_bytes=math.ceil(node["size"]),
            transfer_seconds=send.get(node["id"], 0.0) / 1e3,
            group=str(node.get("colorClass", "")),
            backward=bool(node.get("isBackwardNode", False)),
        )
        for node in nodes
    )
    graph = Graph(path.stem, operators, tuple((numbers[edge["sourceId"]], numbers[edge["destId"]]) for edge in edges))
    memory, devices = values.get("maxSizePerFPGA"), values.get("maxFPGAs")
    return GraphFile(graph, tuple(str(node["id"]) for node in nodes), devices, None if memory is None else int(memory))


def _pipedream(path: Path, text: str) -> GraphFile:
    """PipeDream's profiles: `id -- layer -- name=number, …` for a layer, and an indented `id -- id` for an edge."""
    layers, edges = {}, []
    for number, line in enumerate(text.splitlines(), 1):
        if edge := _EDGE.fullmatch(line):
            edges.append((edge["source"], edge["target"]))
        elif node := _NODE.fullmatch(line):
            layers[node["id"]] = (node["text"], _costs(path, number, node["costs"]))
        elif line.strip():
            raise TightfitError(f"`{path}`: line {number} is neither a layer nor an edge", hint="a layer is `id -- text -- costs`")
    _refuse(path, [f"an edge names `{end}`, which is not there" for end in dict.fromkeys(sum(edges, ())) if end not in layers])
    numbers = {identity: number for number, identity in enumerate(layers)}
    forward = [(numbers[source], numbers[target]) for source, target in edges]
    graph = Graph(path.name.removesuffix(".graph.txt"), *_with_backward(tuple(layers.values()), forward))
    return GraphFile(graph, (*layers, *(f"{identity}'" for identity in layers)))


def _with_backward(
    layers: tuple[tuple[str, dict[str, float]], ...], edges: list[tuple[int, int]]
) -> tuple[tuple[Operator, ...], tuple[tuple[int, int], ...]]:
    """A training step from layers: each forward, then each backward (number + `len(layers)`), which reads input, output and gradient."""
    there, back = [], []
    for number, (text, costs) in enumerate(layers):
        out, group = int(costs["activation_size"]), f"layer {number}"
        weights = 2 * int(costs["parameter_size"])  # and their gradients
        there.append(Operator(text, costs["forward_compute_time"] / 1e3, weights, output_bytes=out, group=group))
        read = sum(int(layers[source][1]["activation_size"]) for source, target in edges if target == number)
        back.append(Operator(f"{text}'", costs["backward_compute_time"] / 1e3, output_bytes=read, group=group, backward=True))
    behind = len(layers)
    arrows = [*edges, *((number, number + behind) for number in range(behind))]
    arrows += [(source, target + behind) for source, target in edges] + [(target + behind, source + behind) for source, target in edges]
    return (*there, *back), tuple(dict.fromkeys(arrows))


def _costs(path: Path, line: int, text: str) -> dict[str, float]:
    """`name=number` pairs; a layer with several outputs lists their sizes as `[a; b]`."""
    found = {}
    for name, value in re.findall(r"([a-z_]+)=(\[[^\]]*\]|[^,\s]+)", text):
        try:
            found[name] = sum(float(part) for part in value.strip("[]").split(";"))
        except ValueError as error:
            raise TightfitError(f"`{path}`: line {line} has {name}={value}, which is not a number") from error
    needed = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")
    _refuse(path, [f"line {line} lacks {name}" for name in needed if name not in found])
    _refuse(path, [f"line {line} has {name}={found[name]:g}" for name in needed if not 0 <= found[name] < math.inf])
    return found


def _missing(place: str, given: Any, needed: Mapping[str, type]) -> list[str]:
    """What `given` lacks of what it needs, each by name."""
    if not isinstance(given, dict):
        return [f"{place} is not an object"]
    kinds = {int: (int,), float: (int, float), str: (str,)}
    return [
        f"{place} lacks {name}" if name not in given else f"{place} has {name} of {given[name]!r}"
        for name, kind in needed.items()
        if name not in given or isinstance(given[name], bool) or not isinstance(given[name], kinds[kind])
    ]


def _unsound(place: str, given: Any, names: Iterable[str]) -> list[str]:
    """Costs below zero or not finite."""
    found = {name: given[name] for name in names if isinstance(given, dict) and isinstance(given.get(name), (int, float))}
    return [f"{place} has {name} of {cost:g}" for name, cost in found.items() if not 0 <= cost < math.inf]


def _refuse(path: Path, faults: list[str]) -> None:
    if faults:
        more = f"; and {len(faults) - _MOST_FAULTS} more" if len(faults) > _MOST_FAULTS else ""
        raise TightfitError(
            f"`{path}`: {'; '.join(faults[:_MOST_FAULTS])}{more}", hint="every operator needs its time and size; costs are zero or more"
        )
