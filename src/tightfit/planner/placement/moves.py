"""Moves: small changes of a placement that keep what lasts inside each device's memory."""

import random
from collections.abc import Sequence

from tightfit.planner.placement.orders import group_of, places
from tightfit.planner.placement.pack import group_bytes, line_of
from tightfit.planner.placement.times import Times
from tightfit.terms.graph import Graph

_ELSEWHERE = 0.15  # of all moves, those to any device and not to that of a neighbour
_SINGLE = 0.4  # of all patches, those of one group
_EVICTIONS = 60  # tries to make room on the device that a patch goes to


class Moves:
    """Random patches of groups and where they could go. A patch hangs together, and is on one device."""

    def __init__(self, graph: Graph, costs: Times, chance: random.Random) -> None:
        self._graph, self._chance = graph, chance
        self._devices = len(costs.run)
        self.group, self.sizes = group_of(graph), group_bytes(graph)
        near: list[dict[int, None]] = [{} for _ in self.sizes]
        for source, target in graph.edges:
            if self.group[source] != self.group[target]:
                near[self.group[source]][self.group[target]] = None
                near[self.group[target]][self.group[source]] = None
        self._near = [tuple(groups) for groups in near]
        self._line = line_of(graph, graph.order)
        self._place = places(self._line)

    def patch(self, home: Sequence[int], left: Sequence[int], among: Sequence[int]) -> dict[int, int] | None:
        """New devices for a patch around one group of `among`, and for what makes room for it; None if that failed.

        `home` is the device of each group, `left` the bytes that each device has left beside what lasts.
        """
        seed = self._chance.choice(among)
        return self._sent(home, left, self._grown(home, seed), [seed])

    def parted(self, home: Sequence[int], left: Sequence[int], among: Sequence[int]) -> dict[int, int] | None:
        """The same for all groups of one device that lie from one of `among` on in the line, or up to it: what a cut there parts off."""
        seed = self._chance.choice(among)
        place = self._place[seed]
        side = self._line[place:] if self._chance.random() < 0.5 else self._line[: place + 1]
        piece = [group for group in side if home[group] == home[seed]]
        return self._sent(home, left, piece, piece)

    def _sent(self, home: Sequence[int], left: Sequence[int], patch: Sequence[int], border: Sequence[int]) -> dict[int, int] | None:
        """`patch` on another device, mostly one that a neighbour of `border` is on, and what makes room for it."""
        chance, source = self._chance, home[patch[0]]
        others = [home[near] for group in border for near in self._near[group] if home[near] != source]
        if others and chance.random() > _ELSEWHERE:
            target = chance.choice(others)
        else:
            target = chance.randrange(self._devices)
            if target == source:
                return None
        moved = dict.fromkeys(patch, target)
        size = sum(self.sizes[group] for group in moved)
        if size > left[target]:
            return self._with_room(home, left, moved, source, target, size)
        return moved

    def _grown(self, home: Sequence[int], seed: int) -> list[int]:
        """Groups around `seed` on its device, the nearest first; small patches are likelier than large ones."""
        chance = self._chance
        if chance.random() < _SINGLE:
            return [seed]
        most = min(1 << chance.randint(1, 9), max(2, len(home) // 2))
        most = chance.randint(2, most)
        found, at = {seed: None}, [seed]
        for group in at:
            near = [other for other in self._near[group] if home[other] == home[seed] and other not in found]
            chance.shuffle(near)
            for other in near[: most - len(found)]:
                found[other] = None
                at.append(other)
            if len(found) >= most:
                break
        return list(found)

    def _with_room(
        self, home: Sequence[int], left: Sequence[int], moved: dict[int, int], source: int, target: int, size: int
    ) -> dict[int, int] | None:
        """`moved`, and enough others away from `target`, preferably those that touch `source`."""
        chance = self._chance
        room = list(left)
        room[source] += size
        room[target] -= size
        touching = [other for group in moved for other in self._near[group] if home[other] == target and self.sizes[other]]
        for _ in range(_EVICTIONS):
            if room[target] >= 0:
                break
            group = chance.choice(touching) if touching and chance.random() < 0.6 else chance.randrange(len(home))
            to = source if chance.random() < 0.7 else chance.randrange(self._devices)
            if home[group] != target or group in moved or to == target or room[to] < self.sizes[group] or not self.sizes[group]:
                continue
            moved[group] = to
            room[to] -= self.sizes[group]
            room[target] += self.sizes[group]
        return moved if room[target] >= 0 else None

    def shifted(self, order: Sequence[int], at: int) -> list[int] | None:
        """`order` with `at` at another place between what it reads and what reads it; None if there is no other."""
        place = order.index(at)
        parents, children = set(self._graph.parents[at]), set(self._graph.children[at])
        first, last = place, place
        while first and order[first - 1] not in parents:
            first -= 1
        while last + 1 < len(order) and order[last + 1] not in children:
            last += 1
        if first == last:
            return None
        to = self._chance.randint(first, last)
        rest = [other for other in order if other != at]
        return None if to == place else [*rest[:to], at, *rest[to:]]
