"""Device map: a placement in the words of accelerate and transformers: paths of modules, and the device of each."""

from collections.abc import Mapping, Sequence

from tightfit.describe.graph import Captured


def device_map(captured: Captured, device_of: Sequence[int]) -> dict[str, int]:
    """What `from_pretrained(device_map=…)` takes: as few paths as say where each parameter goes, in the model's order.

    A parameter goes to the device of the first operator that reads it; one that nobody reads, to that of the parameter before it.
    Blocks must be whole for accelerate, so the graph should be of the grain `block`.
    """
    return _fewest("", _homes(captured, device_of))


def _homes(captured: Captured, device_of: Sequence[int]) -> dict[str, int]:
    """The device of each module that has parameters of its own, by path."""
    readers: dict[int, int] = {}
    for part, calls in enumerate(captured.parts):
        for call in calls:
            for storage in captured.tape.calls[call].reads:
                readers.setdefault(storage, part)
    homes: dict[str, int] = {}
    last = device_of[captured.graph.order[0]]
    for number, storage in enumerate(captured.tape.storages):
        if storage.kind == "parameter":
            last = device_of[readers[number]] if number in readers else last
            homes.setdefault(storage.name.rpartition(".")[0], last)
    return homes


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
