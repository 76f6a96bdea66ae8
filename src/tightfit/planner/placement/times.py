"""Times: what each operator takes on each device, and what its output takes from device to device. Looked up, for it is asked for often."""

from dataclasses import dataclass

from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph


@dataclass(frozen=True)
class Times:
    """Seconds by number; devices of one speed and links of one kind share a row."""

    run: tuple[tuple[float, ...], ...]  # [device][operator]
    send: tuple[tuple[tuple[float, ...], ...], ...]  # [sending device][receiving device][operator]; zero on the diagonal

    @property
    def fastest_run(self) -> list[float]:
        """What each operator takes where it runs fastest."""
        return [min(on) for on in zip(*dict.fromkeys(self.run), strict=True)]

    @property
    def fastest_send(self) -> list[float]:
        """What each output takes on the best link for it; zero where there is but one device."""
        between = [row for source, rows in enumerate(self.send) for target, row in enumerate(rows) if source != target]
        rows = list(dict.fromkeys(between)) or [self.send[0][0]]
        return [min(over) for over in zip(*rows, strict=True)]

    @property
    def typical_run(self) -> list[float]:
        """What each operator takes in the mean over the devices."""
        return [sum(on) / len(on) for on in zip(*self.run, strict=True)]

    @property
    def typical_send(self) -> list[float]:
        """What each output takes in the mean over the pairs of devices; zero where there is but one device."""
        pairs = max(1, len(self.send) * (len(self.send) - 1))
        return [sum(over) / pairs for over in zip(*(row for rows in self.send for row in rows), strict=True)]


def times(graph: Graph, cluster: Cluster) -> Times:
    """The times of `graph` on `cluster`."""
    numbers = range(len(cluster.devices))
    at_speed = {speed: tuple(one.seconds / speed for one in graph.operators) for speed in {device.speed for device in cluster.devices}}
    links = {(source, target): cluster.link_between(source, target) for source in numbers for target in numbers if source != target}
    over_link = {link: tuple(link.seconds(one) for one in graph.operators) for link in set(links.values())}
    stays = (0.0,) * len(graph.operators)
    return Times(
        run=tuple(at_speed[device.speed] for device in cluster.devices),
        send=tuple(tuple(stays if s == t else over_link[links[s, t]] for t in numbers) for s in numbers),
    )
