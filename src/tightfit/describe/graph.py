"""Graph: what a recorded step did becomes a graph of operators: their bytes, who reads whom, and what must stay together.

It knows nothing of how a step is recorded (`rehearse/capture.py`), nor of seconds (`rehearse/costs.py`).
"""

from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tightfit.describe.tape import Call, Tape
from tightfit.terms.errors import TightfitError, near
from tightfit.terms.graph import Graph, Operator

GRAINS = ("operator", "module", "block")
_SHOWN = 3
"""Operations that the name of an operator of several lists."""


@dataclass(frozen=True)
class Captured:
    """A graph, the step it stands for, and the calls that each of its operators makes: none, where it is an input of the model."""

    graph: Graph
    tape: Tape
    parts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Flow:
    """Who makes, reads and changes each storage, by part."""

    maker: Mapping[int, int]
    readers: Mapping[int, tuple[int, ...]]
    writers: Mapping[int, tuple[int, ...]]
    edges: tuple[tuple[int, int], ...]


def graph_of(
    tape: Tape,
    grain: str = "operator",
    whole: Container[str] = (),
    state_bytes: int = 0,
    gradients_stay: bool = True,
    tied: bool = True,
) -> Captured:
    """The graph of a recorded step; all seconds are 0.

    `grain`: `operator`: every operation that is no view; `module`: one operator for each run of a leaf module, and of operations between
    them; `block`: one for each of the model's repeated blocks, and for what runs before, between and after them. Modules of the classes
    `whole` stay in one piece at any grain.
    `state_bytes`: what the optimizer keeps for each trained element (AdamW: 8). `gradients_stay`: their memory is taken for good, as where
    they add up over several batches; otherwise from when they are computed, as where each update gives them up. `tied`: a parameter of
    several names lies on one device; otherwise on each that reads it, as on the first and the last stage of a pipeline.

    Bytes: parameters and buffers, once each, belong to the first operator of its group that reads them; with a parameter that has a
    gradient go the gradient, if it stays, and the optimizer's state. An output counts all storages that an operator leaves to others. What
    only its own backward reads counts as kept, so that it is not sent with the output. What an operator makes and needs by itself is
    temporary, for as long as the step that was recorded held it: of a whole module, for as long as its Python does.
    Groups: users of one parameter; an operation in place and whoever made what it changes; forward and backward of one operation.
    Where an operation in place follows readers of the old contents, it counts as a reader of what those made. A result that is read
    too counts twice, as an output until it is read, and as kept.
    """
    if grain not in GRAINS:
        raise TightfitError(f"no grain is called `{grain}`", hint=near(grain, GRAINS))
    inputs = _inputs_read(tape)
    if grain == "block" and not any(visit.block for visit in tape.visits):
        grain = "module"
    pieces = {number: _piece(tape, call, grain, whole) for number, call in enumerate(tape.calls)}
    parts = (*((),) * len(inputs), *_runs(tape, pieces))
    given = (f"input: {tape.storages[storage].name}" for storage in inputs)
    names = tuple(_numbered((*given, *(_name(tape, calls, pieces[calls[0]]) for calls in parts[len(inputs) :]))))
    flow = _flow(tape, inputs, {call: part for part, calls in enumerate(parts) for call in calls})
    operators = _operators(tape, parts, flow, names, state_bytes, gradients_stay, tied)
    return Captured(Graph(tape.name, operators, flow.edges), tape, parts)


def _operators(
    tape: Tape, parts: Sequence[tuple[int, ...]], flow: _Flow, names: Sequence[str], state_bytes: int, gradients_stay: bool, tied: bool
) -> tuple[Operator, ...]:
    part_of = {call: part for part, calls in enumerate(parts) for call in calls}
    groups = _groups(tape, parts, part_of, flow, tied)
    shared = Counter(groups)
    backward = [bool(calls) and tape.calls[calls[0]].backward for calls in parts]
    outputs, kept, inner = _made(tape, flow, groups, backward, gradients_stay)
    weights = _weights(tape, part_of, flow, groups, state_bytes, gradients_stay)
    return tuple(
        Operator(
            name=name,
            seconds=0.0,
            weight_bytes=weights[part],
            kept_bytes=kept[part],
            temporary_bytes=_temporary(tape, parts[part], inner[part]),
            output_bytes=outputs[part],
            group=names[groups[part]] if shared[groups[part]] > 1 else "",
            backward=backward[part],
        )
        for part, name in enumerate(names)
    )


def _inputs_read(tape: Tape) -> tuple[int, ...]:
    read = {storage for call in tape.calls for storage in (*call.reads, *call.writes)}
    return tuple(number for number, storage in enumerate(tape.storages) if storage.kind == "input" and number in read)


def _piece(tape: Tape, call: Call, grain: str, whole: Container[str]) -> tuple[int | None, bool] | None:
    """The visit with which `call` goes into one operator, and whether with all of it; None where it stands alone."""
    chain = tape.visits_of(call)
    for visit in chain:
        seen = tape.visits[visit]
        if seen.kind in whole or (grain == "block" and seen.block) or (grain == "module" and seen.leaf):
            return visit, True
    return {"operator": None, "module": (call.visit, False), "block": (None, True)}[grain]


def _runs(tape: Tape, pieces: Mapping[int, tuple[int | None, bool] | None]) -> Iterator[tuple[int, ...]]:
    """Calls that follow each other and belong to one piece. Being neighbours, they close no circle when they become one."""
    run: list[int] = []
    last: Any = None
    for number, call in enumerate(tape.calls):
        key = (pieces[number], call.backward)
        if run and (pieces[number] is None or key != last):
            yield tuple(run)
            run = []
        run.append(number)
        last = key
    if run:
        yield tuple(run)


def _flow(tape: Tape, inputs: Iterable[int], part_of: Mapping[int, int]) -> _Flow:
    maker = {storage: part for part, storage in enumerate(inputs)}
    readers: dict[int, dict[int, None]] = defaultdict(dict)
    writers: dict[int, list[int]] = defaultdict(list)
    since: dict[int, set[int]] = defaultdict(set)  # who has read a storage since it was last changed
    parents: dict[int, dict[int, None]] = defaultdict(dict)
    for number, call in enumerate(tape.calls):
        part = part_of[number]
        for storage in (*call.reads, *call.writes):
            readers[storage][part] = None
            if storage in maker:
                parents[part][maker[storage]] = None
            if writers[storage]:
                parents[part][writers[storage][-1]] = None
        for storage in call.reads:
            since[storage].add(part)
        for storage in call.writes:
            parents[part].update(dict.fromkeys(sorted(since.pop(storage, ()))))
            writers[storage].append(part)
        for storage in call.makes:
            maker[storage] = part
    edges = tuple((source, target) for target, sources in parents.items() for source in sources if source != target)
    return _Flow(maker, {at: tuple(found) for at, found in readers.items()}, {at: tuple(found) for at, found in writers.items()}, edges)


def _groups(tape: Tape, parts: Sequence[tuple[int, ...]], part_of: Mapping[int, int], flow: _Flow, tied: bool) -> list[int]:
    """For each part the first part of its group."""
    leader = list(range(len(parts)))

    def find(part: int) -> int:
        while leader[part] != part:
            leader[part] = part = leader[leader[part]]
        return part

    def join(*members: int) -> None:
        first = min(map(find, members))
        for member in members:
            leader[find(member)] = first

    for number, storage in enumerate(tape.storages):
        users = flow.readers.get(number, ())
        if users and storage.kind in ("parameter", "buffer") and (tied or not storage.aliases):
            join(*users)
        if number in flow.maker and flow.writers.get(number):
            join(flow.maker[number], *flow.writers[number])
    for number, call in enumerate(tape.calls):
        if call.forward is not None:
            join(part_of[number], part_of[call.forward])
    numbers = {storage.name: number for number, storage in enumerate(tape.storages) if storage.kind == "parameter"}
    for name, gradient in tape.gradients.items():
        users = flow.readers.get(numbers[name], ()) if tied or not tape.storages[numbers[name]].aliases else ()
        if users and gradient.storage in flow.maker:
            join(flow.maker[gradient.storage], *users)
    return [find(part) for part in range(len(parts))]


def _made(
    tape: Tape, flow: _Flow, groups: Sequence[int], backward: Sequence[bool], gradients_stay: bool
) -> tuple[Counter[int], Counter[int], dict[int, set[int]]]:
    """By part: bytes of outputs, bytes kept for its own backward, and the storages that it needs by itself."""
    results = {window.storage for window in tape.results}
    gradients = {window.storage for window in tape.gradients.values()}
    owned = gradients if gradients_stay else set()  # counted with the weights
    results |= gradients - owned
    read = {source for source, _ in flow.edges}
    outputs, kept, inner = Counter[int](), Counter[int](), defaultdict[int, set[int]](set)
    for storage, part in flow.maker.items():
        size = tape.storages[storage].size_bytes
        others = [reader for reader in flow.readers.get(storage, ()) if reader != part]
        own = not backward[part] and all(backward[reader] and groups[reader] == groups[part] for reader in others)
        if storage in owned:
            continue
        if storage in results:
            kept[part] += size if part in read else 0  # it stays when the readers are done
            outputs[part] += size if others or part not in read else 0
        elif not others:
            inner[part].add(storage)
        elif own:
            kept[part] += size
        else:
            outputs[part] += size
    return outputs, kept, inner


def _temporary(tape: Tape, calls: Sequence[int], inner: Container[int]) -> int:
    """The most that `calls` hold at once of what they need by themselves: until nobody reads it, and until Python has given it up."""
    last = {storage: call for call in calls for storage in (*tape.calls[call].makes, *tape.calls[call].reads, *tape.calls[call].writes)}
    ends = Counter[int]()
    for storage, call in last.items():
        if storage in inner:
            ends[min(max(call, tape.freed.get(storage, 0) - 1), calls[-1])] += tape.storages[storage].size_bytes
    live = peak = 0
    for number in calls:
        live += sum(tape.storages[storage].size_bytes for storage in tape.calls[number].makes if storage in inner)
        peak = max(peak, live + tape.calls[number].workspace_bytes)
        live -= ends[number]
    return peak


def _weights(
    tape: Tape, part_of: Mapping[int, int], flow: _Flow, groups: Sequence[int], state_bytes: int, gradients_stay: bool
) -> Counter[int]:
    """By part: bytes of the parameters and buffers that it is the first of its group to read, or, of unread ones, that lie next to it."""
    weights = Counter[int]()
    for number, storage in enumerate(tape.storages):
        if storage.kind not in ("parameter", "buffer"):
            continue
        users = flow.readers.get(number) or (part_of[_nearest(tape, storage.name)],)
        trains = state_bytes * storage.elements + (storage.gradient_bytes if gradients_stay else 0) if storage.name in tape.gradients else 0
        for first in {groups[user]: user for user in sorted(users, reverse=True)}.values():
            weights[first] += storage.size_bytes + trains
    return weights


def _nearest(tape: Tape, name: str) -> int:
    """The first call whose module's path shares most with `name`."""

    def shared(number: int) -> int:
        words = zip(name.split("."), _path(tape, tape.calls[number]).split("."), strict=False)
        return next((depth for depth, (one, other) in enumerate(words) if one != other), len(name))

    return max(range(len(tape.calls)), key=lambda number: (shared(number), -number))


def _path(tape: Tape, call: Call) -> str:
    return "loss" if call.visit is None else tape.visits[call.visit].path


def _name(tape: Tape, calls: Sequence[int], piece: tuple[int | None, bool] | None) -> str:
    """Where in the model an operator stands, and what it does: `encoder.layer.3.attention.self.query: addmm`."""
    first = tape.calls[calls[0]]
    path = _path(tape, first) if piece is None or piece[0] is None else tape.visits[piece[0]].path
    deeds = list(dict.fromkeys(_deed(tape.calls[call].function) for call in calls))
    shown = "" if piece and piece[1] and path else ", ".join(deeds[:_SHOWN]) + (", …" if len(deeds) > _SHOWN else "")
    suffix = " backward" if first.backward and not shown.endswith("_backward") else ""
    return ": ".join(part for part in (path, shown) if part) + suffix


def _deed(function: Any) -> str:
    """`aten.add.Tensor` is `add`."""
    return str(function).split(".")[1] if "." in str(function) else str(function)


def _numbered(names: Iterable[str]) -> Iterator[str]:
    """Names that stood before get a number."""
    seen = Counter[str]()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} {seen[name]}"
