"""Graphs of operators from files: of msr-fiddle/dnn-partitioning (JSON), of PipeDream's profiler (text), and our own (JSON)."""

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tightfit.terms.errors import TightfitError, near
from tightfit.terms.graph import Graph, Operator

_LAYER = re.compile(r"(?P<id>\S+) -- (?P<text>.*) -- (?P<costs>[a-z_]+=.*)")
_EDGE = re.compile(r"\s+(?P<source>\S+) -- (?P<target>\S+)")
_MOST_FAULTS = 5
_MOST = 10**15
"""A petabyte, or thousands of years: a cost above it is a fault of its file."""


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
    one `colorClass` goes to one device; a node for CPUs only is refused. PipeDream (SOSP 2019): a training step; every layer becomes its
    forward and, on the same device, its backward, which reads the layer's input and output; weights and gradients stay for good.
    Raises `TightfitError` for a file that is none of these, and names what is missing or unsound in it.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TightfitError(f"cannot read `{file}`: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TightfitError(f"`{file}` is not text", hint="a graph is a JSON file, or a text file of PipeDream's profiler") from error
    if not text.lstrip().startswith(("{", "[")):
        return _pipedream(path, text)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # what is nested too deeply ends in the latter
        raise TightfitError(f"`{file}` is not sound JSON: {error}") from error
    if not isinstance(values, dict) or not ({"nodes", "operators"} & set(values)):
        raise TightfitError(f"`{file}` holds no graph", hint="a graph has `nodes` and `edges`, or `operators` and `edges`")
    return _partitioning(path, values) if "nodes" in values else _own(path, values)


def graph_values(graph: Graph) -> dict[str, Any]:
    """The graph as our own JSON, which `read_graph` reads."""
    return {"name": graph.name, "operators": [asdict(operator) for operator in graph.operators], "edges": [list(e) for e in graph.edges]}


def _own(path: Path, values: Mapping[str, Any]) -> GraphFile:
    given, edges = _rows(path, values, "operators"), _rows(path, values, "edges")
    faults = _faults("the graph", values, {"name": _is_text})
    for number, operator in enumerate(given):
        strange = sorted(set(operator) - set(_OPERATOR)) if isinstance(operator, dict) else []
        if strange:
            raise TightfitError(f"`{path}`: operator {number} has an unknown `{strange[0]}`", hint=near(strange[0], _OPERATOR))
        faults += _faults(f"operator {number}", operator, _OPERATOR, ("name", "seconds"))
    _refuse(path, faults)
    names = Counter(operator["name"] for operator in given)
    twins = [f"{count} operators are called `{name}`" for name, count in names.items() if count > 1]
    _refuse(path, twins, hint="the answer calls operators by their names, so each needs its own")
    operators = tuple(Operator(**operator) for operator in given)
    graph = Graph(values.get("name", path.stem), operators, tuple(_pair(path, number, edge) for number, edge in enumerate(edges)))
    return GraphFile(graph, tuple(names))


def _pair(path: Path, number: int, edge: Any) -> tuple[int, int]:
    if not (isinstance(edge, list) and len(edge) == 2 and all(type(end) is int for end in edge)):
        raise TightfitError(f"`{path}`: edge {number} is not a pair of operators' numbers")
    return edge[0], edge[1]


def _partitioning(path: Path, values: Mapping[str, Any]) -> GraphFile:
    """msr-fiddle/dnn-partitioning: the README's format."""
    nodes, edges = _rows(path, values, "nodes"), _rows(path, values, "edges")
    faults = _faults("the graph", values, _LIMITS)
    for number, node in enumerate(nodes):
        place = f"node {reprlib.repr(node['id'])}" if isinstance(node, dict) and "id" in node else f"node at place {number}"
        faults += _faults(place, node, _NODE, ("id", "fpgaLatency", "size"))
    for number, edge in enumerate(edges):
        faults += _faults(f"edge {number}", edge, _TRANSFER, tuple(_TRANSFER))
    _refuse(path, faults)
    numbers = {node["id"]: number for number, node in enumerate(nodes)}
    if len(numbers) < len(nodes):
        raise TightfitError(f"`{path}`: two nodes have one `id`")
    strangers = {edge[end] for edge in edges for end in ("sourceId", "destId")} - set(numbers)
    _refuse(path, [f"an edge names node {reprlib.repr(stranger)}, which is not there" for stranger in sorted(strangers)])
    idle = [f"node {node['id']} cannot run on an accelerator" for node in nodes if not node.get("supportedOnFpga", True)]
    _refuse(path, idle, hint="operators are placed on accelerators only; leave out those with a `supportedOnFpga` of 0")
    send: dict[int, float] = {}  # the README: the same for all edges of a source; where not, the dearest
    for edge in edges:
        send[edge["sourceId"]] = max(edge["cost"], send.get(edge["sourceId"], 0.0))
    operators = tuple(
        Operator(
            name=str(node.get("name", node["id"])),
            seconds=node["fpgaLatency"] / 1e3,
            weight_bytes=math.ceil(node["size"]),
            transfer_seconds=send.get(node["id"], 0.0) / 1e3,
            group="" if node.get("colorClass") is None else str(node["colorClass"]),
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
        elif node := _LAYER.fullmatch(line):
            if node["id"] in layers:
                raise TightfitError(f"`{path}`: line {number} names layer `{node['id']}` again", hint="every layer has an id of its own")
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
    _refuse(path, [f"line {line} has {name}={found[name]:g}" for name in needed if not _is_cost(found[name])])
    return found


def _rows(path: Path, values: Mapping[str, Any], name: str) -> list[Any]:
    """A list of the file; empty where it is not there."""
    found = values.get(name, [])
    if not isinstance(found, list):
        raise TightfitError(f"`{path}`: `{name}` is not a list")
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_cost(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _MOST  # not bool, and neither below zero nor NaN


def _is_bytes(value: Any) -> bool:
    return type(value) is int and _is_cost(value)


def _is_number(value: Any) -> bool:
    return type(value) is int


def _is_flag(value: Any) -> bool:
    return type(value) in (int, bool) and value in (0, 1)


_KINDS: Mapping[Any, Callable[[Any], bool]] = {
    str: _is_text,
    int: _is_bytes,
    float: _is_cost,
    float | None: lambda value: value is None or _is_cost(value),
    bool: lambda value: type(value) is bool,
}
_OPERATOR = {entry.name: _KINDS[entry.type] for entry in fields(Operator)}
_NODE = {
    "id": _is_number,
    "name": _is_text,
    "fpgaLatency": _is_cost,
    "size": _is_cost,
    "colorClass": lambda value: value is None or _is_text(value) or _is_number(value),
    "isBackwardNode": _is_flag,
    "supportedOnFpga": _is_flag,
}
_TRANSFER = {"sourceId": _is_number, "destId": _is_number, "cost": _is_cost}
_LIMITS = {
    "maxSizePerFPGA": lambda value: value is None or (_is_cost(value) and value >= 1),
    "maxFPGAs": lambda value: value is None or (_is_bytes(value) and value >= 1),
}


def _faults(place: str, given: Any, sound: Mapping[str, Callable[[Any], bool]], needed: Iterable[str] = ()) -> list[str]:
    """What `given` lacks of what it needs, and what it has that is not `sound`, each by name."""
    if not isinstance(given, dict):
        return [f"{place} is not an object"]
    lacking = [f"{place} lacks {name}" for name in needed if name not in given]
    unsound = [name for name, is_sound in sound.items() if name in given and not is_sound(given[name])]
    return lacking + [f"{place} has {name} of {reprlib.repr(given[name])}" for name in unsound]


def _refuse(path: Path, faults: list[str], hint: str = "every operator needs its time and size; costs are zero or more") -> None:
    if faults:
        more = f"; and {len(faults) - _MOST_FAULTS} more" if len(faults) > _MOST_FAULTS else ""
        raise TightfitError(f"`{path}`: {'; '.join(faults[:_MOST_FAULTS])}{more}", hint=hint)
