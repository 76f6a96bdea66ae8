"""Cluster: the devices that operators are placed on and the links between them, as nouns and as people write them."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tightfit.terms.errors import TightfitError
from tightfit.terms.graph import Operator
from tightfit.terms.units import parse_size

LINK = "12GB/s"
"""What a link carries where nobody says: PCI Express 3.0 with 16 lanes, of whose 15.75 GB/s about so much is left for data."""

_AS_DEVICES = "write `4x8GiB`, `2x8GiB,24GiB@1.5`, or `4` with `--memory 8GiB`"
_AS_LINK = "write `12GB/s`, or `0-1=50GB/s` for two devices"

_MOST_DEVICES = 1024
_MOST_LATENCY = 3600  # seconds


@dataclass(frozen=True)
class Device:
    """What runs operators. An operator takes `seconds / speed`. Raises `TightfitError` for a device without memory or speed."""

    name: str
    memory_bytes: int
    speed: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.memory_bytes < math.inf:
            raise TightfitError(f"`{self.name}` has {self.memory_bytes} bytes", hint="give each device a memory above zero")
        if not 0 < self.speed < math.inf:
            raise TightfitError(f"`{self.name}` has a speed of {self.speed}", hint="a speed is finite and above zero")


@dataclass(frozen=True)
class Link:
    """What a tensor takes from one device to another: `latency_seconds + bytes / bytes_per_second`.

    Raises `TightfitError` for a link that carries nothing, and for a latency below zero or not finite.
    """

    bytes_per_second: float
    latency_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.bytes_per_second < math.inf:
            raise TightfitError(f"a link carries {self.bytes_per_second} bytes a second", hint="a rate is finite and above zero")
        if not 0 <= self.latency_seconds <= _MOST_LATENCY:
            raise TightfitError(
                f"a link has a latency of {self.latency_seconds} seconds", hint=f"a latency is from 0 to {_MOST_LATENCY} seconds"
            )

    def seconds(self, operator: Operator) -> float:
        """Seconds to send the output of `operator` once."""
        if operator.transfer_seconds is not None:
            return operator.transfer_seconds
        return self.latency_seconds + operator.output_bytes / self.bytes_per_second


@dataclass(frozen=True)
class Cluster:
    """Devices, and the links between them.

    `serial`: each device has one channel, which sends or receives one tensor at a time (Baechi's TensorFlow version); otherwise transfers
    start when their tensor is ready and do not disturb each other (its PyTorch version).
    Raises `TightfitError` for no devices, and for links of devices that are not there.
    """

    devices: tuple[Device, ...]
    link: Link  # between any two devices that `links` does not name
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict)  # by numbers of the sending and of the receiving device
    serial: bool = False

    def __post_init__(self) -> None:
        if not self.devices:
            raise TightfitError("a cluster has no devices", hint="give it one at least")
        for pair in self.links:
            if not 0 <= min(pair) <= max(pair) < len(self.devices):
                raise TightfitError(f"a link is from device {pair[0]} to {pair[1]}, and there are devices 0 to {len(self.devices) - 1}")

    def link_between(self, source: int, target: int) -> Link:
        """The link from device `source` to device `target`."""
        return self.links.get((source, target), self.link)


def parse_devices(text: str, memory_bytes: int | None = None) -> tuple[Device, ...]:
    """Devices from `4x8GiB`, `2x8GiB,24GiB@1.5` (the last is 1.5 times as fast), or a bare count, of `memory_bytes` each.

    Raises `TightfitError` for anything else.
    """
    found: list[tuple[int, float]] = []
    for part in text.split(","):
        count, size, speed = _parse_part(part)
        each_bytes = memory_bytes if size is None else size
        if each_bytes is None:
            raise TightfitError(f"`{part.strip()}` devices of what memory?", hint="add `--memory 8GiB`, or write `--devices 4x8GiB`")
        found += [(each_bytes, speed)] * count
    return tuple(Device(f"device {number}", size, speed) for number, (size, speed) in enumerate(found))


def lacks_memory(text: str) -> bool:
    """Whether `text` has a bare count, so that `parse_devices` needs to be told the memory of each."""
    return any(size is None for _, size, _ in map(_parse_part, text.split(",")))


def _parse_part(text: str) -> tuple[int, int | None, float]:
    """How many devices, bytes of each (None after a bare count), and their speed."""
    match = re.fullmatch(r"\s*(?:(\d{1,18})\s*[x×]\s*)?([^@\s][^@]*?)\s*(?:@\s*(\d{1,6}(?:\.\d{1,6})?))?\s*", text, re.ASCII)
    if match is None:
        raise TightfitError(f"`{text.strip()}` is not a device" if text.strip() else "a device is missing", hint=_AS_DEVICES)
    count, size, speed = int(match[1] or 1), match[2], float(match[3] or 1)
    bare = match[1] is None and re.fullmatch(r"\d{1,18}", size, re.ASCII) is not None
    if bare:
        count = int(size)
    if not 0 < count <= _MOST_DEVICES or speed <= 0:
        hint = f"give 1 to {_MOST_DEVICES} devices, with a speed above zero; a size has a unit, such as `8GiB`"
        raise TightfitError(f"`{text.strip()}` is no device", hint=hint)
    try:
        return count, None if bare else parse_size(size), speed
    except TightfitError as error:
        raise TightfitError(f"`{text.strip()}` is not a device: {error}", hint=_AS_DEVICES) from error


def parse_links(texts: Iterable[str], devices: int, latency_seconds: float = 0.0) -> tuple[Link, dict[tuple[int, int], Link]]:
    """The link between any two devices, and the links of pairs, from `12GB/s` and `0-1=50GB/s` (both ways).

    Raises `TightfitError` for a rate that is none, and for a device that is not there.
    """
    link, links = Link(_rate(LINK), latency_seconds), {}
    for text in texts:
        ends, _, rate = text.rpartition("=")
        if not rate.strip():
            raise TightfitError(f"the link `{text}` has no rate", hint=_AS_LINK)
        found = Link(_rate(rate), latency_seconds)
        if not ends:
            link = found
            continue
        match = re.fullmatch(r"\s*(\d{1,6})\s*-\s*(\d{1,6})\s*", ends)
        if match is None or match[1] == match[2]:
            raise TightfitError(f"`{text}` is not a link", hint=_AS_LINK)
        pair = int(match[1]), int(match[2])
        if max(pair) >= devices:
            raise TightfitError(f"`{text}` names device {max(pair)}, and there are devices 0 to {devices - 1}")
        links |= {pair: found, pair[::-1]: found}
    return link, links


def _rate(text: str) -> float:
    """Bytes per second from `12GB/s`."""
    try:
        return float(parse_size(re.sub(r"\s*/\s*s\s*$", "", text)))
    except TightfitError as error:
        raise TightfitError(f"`{text}` is not a rate", hint="write bytes per second, such as `12GB/s`") from error
