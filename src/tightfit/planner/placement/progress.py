"""Progress: a schedule that grows by one operator at a time, and never past a device's memory.

What is placed is exact while transfers do not disturb each other. With one channel per device, a transfer's time is an estimate, for
operators that are placed later may queue before it: what comes of it is for `simulate` to judge.
"""

from collections.abc import Sequence

from tightfit.planner.placement.memory import Profile, lasting_bytes
from tightfit.planner.placement.orders import group_of
from tightfit.planner.placement.times import times
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placement


class Progress:
    """What runs where and when so far, what each device holds over time, and which group is bound to which device."""

    def __init__(self, graph: Graph, cluster: Cluster, pinned: Sequence[int] | None = None) -> None:
        self.graph, self.cluster, self.costs = graph, cluster, times(graph, cluster)
        self.device_of = [-1] * len(graph.operators)
        self.start, self.end = [0.0] * len(graph.operators), [0.0] * len(graph.operators)
        self.order: list[int] = []
        self.free = [0.0] * len(cluster.devices)  # seconds from which on each device is idle
        self.changed: set[int] = set()  # devices that are free later or hold less than before; whoever asks empties it
        self._profile = [Profile() for _ in cluster.devices]
        self._channel = [0.0] * len(cluster.devices)
        self._arrives: dict[tuple[int, int], float] = {}  # transfers so far, by output and receiving device: their end
        self._until: dict[tuple[int, int], float] = {}  # by output and device that holds it: the last use so far
        self._holders: dict[int, list[int]] = {}
        self._unread = [len(children) for children in graph.children]
        self._group = group_of(graph)
        lasting = lasting_bytes(graph)
        self._weights = [sum(graph.operators[at].weight_bytes for at in group) for group in graph.groups]
        self._lasting = [sum(lasting[at] for at in group) for group in graph.groups]
        self.home = [-1 if pinned is None else pinned[group[0]] for group in graph.groups]  # the device of each group
        self._reserved = [False] * len(graph.groups)
        self._room = [device.memory_bytes for device in cluster.devices]  # without the weights that are there for good
        self._promised = [0] * len(cluster.devices)  # what lasts, over all groups that are there

    def may(self, at: int, device: int) -> bool:
        """Whether `at` may go to `device`, as far as its group is not elsewhere, and there is room for what it leaves behind for good."""
        group = self._group[at]
        if self.home[group] >= 0:
            return self.home[group] == device
        return self._promised[device] + self._lasting[group] <= self.cluster.devices[device].memory_bytes

    def devices(self, at: int) -> list[int]:
        """The devices that `at` may go to."""
        home = self.home[self._group[at]]
        return [home] if home >= 0 else [device for device in range(len(self.cluster.devices)) if self.may(at, device)]

    def home_of(self, at: int) -> int:
        """The device that the operator's group is bound to, or -1."""
        return self.home[self._group[at]]

    def arrival(self, at: int, device: int) -> float:
        """Seconds when the last input of `at`, whose parents are all placed, is on `device`."""
        last = 0.0
        if self.cluster.serial:
            for parent in self.graph.parents[at]:
                last = max(last, self.end[parent], self._arrives.get((parent, device), 0.0))
            return max(last, max((over for _, _, over in self._transfers(at, device)), default=0.0))
        for parent in self.graph.parents[at]:
            there = self.end[parent] + self.costs.send[self.device_of[parent]][device][parent]
            if there > last:
                last = there
        return last

    def earliest(self, at: int, device: int) -> float:
        """Seconds when `at` could start on `device`: it is idle, and the inputs are there."""
        return max(self.free[device], self.arrival(at, device))

    def fits(self, at: int, device: int, start: float) -> bool:
        """Whether `device` stays inside its memory at every time when `at` starts there at `start`, after all that runs there so far."""
        group, profile = self._group[at], self._profile[device]
        if not self.may(at, device):
            return False
        room = self._room[device]
        if not self._reserved[group]:
            if self._promised[device] + self._lasting[group] > self.cluster.devices[device].memory_bytes:
                return False
            room -= self._weights[group]
            if profile.peak > room:
                return False
        one, sent = self.graph.operators[at], self._transfers(at, device)
        own = one.kept_bytes + one.temporary_bytes + one.output_bytes
        if profile.peak + sum(self.graph.operators[parent].output_bytes for parent, _, _ in sent) + own <= room:
            return True
        more = 0
        for parent, begin, _ in sent:
            more += self.graph.operators[parent].output_bytes
            if more and profile.highest(begin) + more > room:
                return False
        # nothing starts on the device after `start`, so what it holds then is the most from there on
        return profile.at(start) + more + own <= room

    def put(self, at: int, device: int, start: float) -> None:
        """`at` runs on `device` from `start` on. Whether it fits was asked before."""
        one, profile, group = self.graph.operators[at], self._profile[device], self._group[at]
        if not self._reserved[group]:
            self._reserved[group], self.home[group] = True, device
            self._room[device] -= self._weights[group]
            self._promised[device] += self._lasting[group]
        for parent, begin, over in self._transfers(at, device):
            self._arrives[parent, device] = over
            self._use(parent, self.device_of[parent], over)
            self._holders.setdefault(parent, []).append(device)
            profile.add(begin, self.graph.operators[parent].output_bytes)
            if self.cluster.serial:
                self._channel[self.device_of[parent]] = self._channel[device] = over
        end = start + self.costs.run[device][at]
        self.device_of[at], self.start[at], self.end[at], self.free[device] = device, start, end, end
        self.order.append(at)
        self.changed.add(device)
        profile.add(start, one.kept_bytes + one.output_bytes + one.temporary_bytes)
        profile.add(end, -one.temporary_bytes)
        for parent in self.graph.parents[at]:
            self._use(parent, device, end)
            self._unread[parent] -= 1
            if not self._unread[parent]:
                self._release(parent)

    def placement(self, by: str) -> Placement:
        """What all operators are placed to."""
        return Placement(tuple(self.device_of), tuple(self.order), by)

    def _transfers(self, at: int, device: int) -> list[tuple[int, float, float]]:
        """The transfers that `at` on `device` would add, by start: output, start, end."""
        missing = [
            (self.end[parent], parent)
            for parent in self.graph.parents[at]
            if self.device_of[parent] != device and (parent, device) not in self._arrives
        ]
        added, channel = [], self._channel[:] if self.cluster.serial and missing else []
        for begin, parent in sorted(missing):
            source = self.device_of[parent]
            if channel:
                begin = max(begin, channel[source], channel[device])
            over = begin + self.costs.send[source][device][parent]
            if channel:
                channel[source] = channel[device] = over
            added.append((parent, begin, over))
        return added

    def _use(self, output: int, device: int, until: float) -> None:
        if until > self._until.get((output, device), -1.0):
            self._until[output, device] = until

    def _release(self, output: int) -> None:
        """The last reader is placed: the output goes after its last use, on each device that holds it."""
        for device in (self.device_of[output], *self._holders.pop(output, ())):
            self._profile[device].add(self._until.pop((output, device)), -self.graph.operators[output].output_bytes)
            self.changed.add(device)
