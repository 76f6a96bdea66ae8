"""Device map: a placement in the words of accelerate and transformers: paths of modules, and the device of each."""

from collections.abc import Mapping, Sequence

from tightfit.describe.graph import Captured


def device_map(captured: Captured, device_of: Sequence[int]) -> dict[str, int] | None:
    """What `from_pretrained(device_map=…)` takes: as few paths as say where each parameter goes, in the model's order, tied names last.

    A parameter goes to the device of the first operator that reads it; one that nobody reads, to that of the parameter before it.
    Blocks must be whole for accelerate, so the graph should be of the grain `block`. None where a tied parameter is read on several
    devices: there it would be one.
    """
    homes = _homes(captured, device_of)
    return None if homes is None else _fewest("", homes)


def block_devices(captured: Captured, device_of: Sequence[int]) -> tuple[int, ...]:
    """The device of each of the model's repeated blocks, in the order in which they run."""
    tape, found = captured.tape, dict[str, int]()
    for part, calls in enumerate(captured.parts):
        for call in calls:
            visits = (tape.visits[visit] for visit in tape.visits_of(tape.calls[call]))
            block = next((visit.path for visit in visits if visit.block), None)
            if block is not None:
                found.setdefault(block, device_of[part])
    return tuple(found.values())


def _homes(captured: Captured, device_of: Sequence[int]) -> dict[str, int] | None:
    """The device of each module that has parameters of its own, by path; None where one would have several."""
    readers: dict[int, list[int]] = {}
    for part, calls in enumerate(captured.parts):
        for call in calls:
            for storage in captured.tape.calls[call].reads:
                readers.setdefault(storage, []).append(device_of[part])
    homes: dict[str, int] = {}
    tied: dict[str, int] = {}
    last = device_of[captured.graph.order[0]]
    for number, storage in enumerate(captured.tape.storages):
        if storage.kind == "parameter":
            devices = readers.get(number, [last])
            if storage.aliases and len(set(devices)) > 1:
                return None
            last = devices[0]
            homes.setdefault(_module_of(storage.name), last)
            tied |= dict.fromkeys(map(_module_of, storage.aliases), last)
    return homes | {path: device for path, device in tied.items() if path not in homes}


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _fewest(path: str, homes: Mapping[str, int]) -> dict[str, int]:
    """One entry where all below `path` go to one device, else those of its children."""
    if len(set(homes.values())) == 1:
        return {path: next(iter(homes.values()))}
    depth = len(path) + 1 if path else 0
    children: dict[str, dict[str, int]] = {}
    for name, device in homes.items():
        child = name[:depth] + name[depth:].partition(".")[0]
        children.setdefault(child, {})[name] = device
    if path in children:  # it has parameters of its own, which stand by themselves
        return dict(homes)
    return {name: device for child, inside in children.items() for name, device in _fewest(child, inside).items()}
