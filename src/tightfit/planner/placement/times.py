"""Times: what each operator takes on each device, and what its output takes from device to device. Looked up, for it is asked for often."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph


@dataclass(frozen=True)
class Times:
    """Seconds by number; devices of one speed and links of one kind share a row."""

    run: tuple[tuple[float, ...], ...]  # [device][operator]
    send: tuple[tuple[tuple[float, ...], ...], ...]  # [sending device][receiving device][operator]; zero on the diagonal

    @cached_property
    def fastest_run(self) -> tuple[float, ...]:
        """What each operator takes where it runs fastest."""
        return tuple(min(on) for on in zip(*dict.fromkeys(self.run), strict=True))

    @cached_property
    def fastest_send(self) -> tuple[float, ...]:
        """What each output takes on the best link for it; zero where there is but one device."""
        return tuple(min(over) for over in zip(*(row for row, _ in self._between), strict=True))

    @cached_property
    def typical_run(self) -> tuple[float, ...]:
        """What each operator takes in the mean over the devices."""
        return tuple(sum(on) / len(on) for on in zip(*self.run, strict=True))

    @cached_property
    def typical_send(self) -> tuple[float, ...]:
        """What each output takes in the mean over the pairs of devices; zero where there is but one device."""
        pairs = sum(count for _, count in self._between)
        counted = ([seconds * count for seconds in row] for row, count in self._between)
        return tuple(sum(over) / pairs for over in zip(*counted, strict=True))

    @cached_property
    def _between(self) -> list[tuple[tuple[float, ...], int]]:
        """The rows of `send` between two devices, each once, and for how many pairs it stands; of one device its own."""
        rows = [row for source, rows in enumerate(self.send) for target, row in enumerate(rows) if source != target] or [self.send[0][0]]
        row_of = {id(row): row for row in rows}
        return [(row_of[which], count) for which, count in Counter(map(id, rows)).items()]


def times(graph: Graph, cluster: Cluster) -> Times:
    """The times of `graph` on `cluster`."""
    at_speed = {speed: tuple(one.seconds / speed for one in graph.operators) for speed in {device.speed for device in cluster.devices}}
    over_link = {link: tuple(link.seconds(one) for one in graph.operators) for link in {cluster.link, *cluster.links.values()}}
    send = [[over_link[cluster.link]] * len(cluster.devices) for _ in cluster.devices]
    for (source, target), link in cluster.links.items():
        if max(source, target) < len(send):
            send[source][target] = over_link[link]
    for number in range(len(send)):
        send[number][number] = (0.0,) * len(graph.operators)
    return Times(run=tuple(at_speed[device.speed] for device in cluster.devices), send=tuple(map(tuple, send)))
