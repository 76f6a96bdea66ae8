"""Improve: local search over placements, by their simulated makespan and never past memory.

A move takes a patch of neighbouring groups, or all beyond a cut, to another device, and sends others back where it gets too full; or it
changes the order. It is taken if it is no worse; where nothing better is met for long, a few that are worse are, too (iterated local
search).
"""

import random
import time
from dataclasses import dataclass

from tightfit.planner.placement.graph import Smaller, chains, co_placed
from tightfit.planner.placement.heft import heft
from tightfit.planner.placement.m_etf import earliest_task_first, m_etf
from tightfit.planner.placement.memory import held, inside
from tightfit.planner.placement.moves import Moves
from tightfit.planner.placement.orders import ranks_of, tails, urgent_first
from tightfit.planner.placement.simulate import Clock, fits, run, simulate
from tightfit.planner.placement.starts import cut
from tightfit.planner.placement.times import times
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placement

_PATIENCE = 1500  # moves without a better placement, before the search goes on from the best one by a few moves that may lead uphill
_KICKS, _UPHILL = 6, 0.1  # at most so many, each by at most such a share
_LEVELS = ((8, 0.2), (32, 0.25), (128, 0.25))  # groups joined up to such a part of all work and of a device, for such a share of all effort
_REORDER = 0.15  # of all moves, those that change the order alone
_PARTED = 0.15  # of all others, those of all that lies beyond a cut


@dataclass(frozen=True)
class Effort:
    """How long to search: whichever ends first. Only a search that `evaluations` end finds the same every time."""

    evaluations: int = 20_000
    seconds: float = 20.0


def improve(
    graph: Graph, cluster: Cluster, start: Placement, effort: Effort | None = None, seed: int = 0, good_enough: float = 0.0
) -> Placement:
    """A placement that fits and ends no later than `start`, which fits.

    It ends early at a makespan of `good_enough` seconds: a bound that nothing can beat.
    """
    effort = effort or Effort()
    best = simulate(graph, cluster, start)
    assert fits(cluster, best), "what is improved fits"
    began, seconds, spent = time.perf_counter(), best.makespan, 0
    for share, part in (*_LEVELS, (0, 1.0)):
        left = effort.seconds - (time.perf_counter() - began)
        if seconds <= good_enough or left <= 0 or spent >= effort.evaluations:
            break
        level = _joined(graph, cluster, share) if share else chains(graph)
        first = _nearest(level, cluster, start) if share else level.shrink(start)
        if first is None or not fits(cluster, simulate(level.graph, cluster, first)):
            level, first = (level, None) if share else (chains(graph, -1, -1), start)
        if first is None:
            continue
        search = _Search(level.graph, cluster, first, seed + share, good_enough)
        last = not share
        until = time.perf_counter() + (left if last else effort.seconds * part)
        search.go(effort.evaluations - spent if last else int(effort.evaluations * part), until)
        spent += search.evaluated
        found = level.expand(search.best)
        step = simulate(graph, cluster, found)
        if step.makespan < seconds and fits(cluster, step):
            start, seconds = Placement(found.device_of, found.order, start.by), step.makespan
    return start


def _joined(graph: Graph, cluster: Cluster, share: int) -> Smaller:
    """Operators and their only readers in one group, and the chains in it as one operator each."""
    room = min(device.memory_bytes for device in cluster.devices)
    return chains(co_placed(graph, room / share, graph.seconds / share))


def _nearest(level: Smaller, cluster: Cluster, start: Placement) -> Placement | None:
    """`start` with each larger group where most of its work is; or, where that does not fit, what fits and ends first."""
    near, small = level.shrink(start), level.graph
    if fits(cluster, simulate(small, cluster, near)):
        return near
    found = [way(small, cluster) for way in (cut, m_etf, heft)]
    return min((one for one in found if one is not None), key=lambda one: simulate(small, cluster, one).makespan, default=None)


class _Search:
    """One solution that is changed move by move, and the best that was met."""

    def __init__(self, graph: Graph, cluster: Cluster, start: Placement, seed: int, good_enough: float) -> None:
        self._graph, self._cluster, self._costs = graph, cluster, times(graph, cluster)
        self._chance, self._good_enough, self.evaluated = random.Random(seed), good_enough, 0
        self._moves = Moves(graph, self._costs, self._chance)
        self._only_lasting = not any(one.temporary_bytes or one.output_bytes for one in graph.operators)
        self._device_of, self._order = list(start.device_of), list(start.order)
        self._home = [start.device_of[members[0]] for members in graph.groups]
        self._left = [device.memory_bytes for device in cluster.devices]
        for group, device in enumerate(self._home):
            self._left[device] -= self._moves.sizes[group]
        self._clock = run(graph, cluster, self._costs, self._device_of, self._order)
        self._seconds = self._clock.makespan
        self._latest = [rest * (1 - 1e-9) for rest in tails(graph, self._costs.fastest_run)]  # less what sums may be rounded by
        self._critical = self._critical_path()
        self.best, self._best_seconds, self._by = start, self._clock.makespan, start.by

    def go(self, evaluations: int, until: float) -> None:
        """Search until either runs out."""
        stuck, loose = 0, 0  # moves since the last that was better than the best; moves that may still lead uphill
        for _ in range(evaluations):
            if self._best_seconds <= self._good_enough * (1 + 1e-9) or time.perf_counter() > until:
                break
            self.evaluated += 1
            stuck += 1
            if stuck > _PATIENCE:
                self._back_to_best()
                stuck, loose = 0, self._chance.randint(1, _KICKS)
            changed = self._reordered() if self._chance.random() < _REORDER else self._moved()
            if changed is None:
                continue
            device_of, order, homes = changed
            limit = self._seconds * (1 + _UPHILL) if loose else self._seconds
            before = self._best_seconds
            if self._ends_by(limit, device_of, order):
                clock = run(self._graph, self._cluster, self._costs, device_of, order)
                if clock.makespan <= limit and self._fits(device_of, clock):
                    loose = max(0, loose - 1)
                    self._take(device_of, order, homes, clock)
                    stuck = 0 if self._best_seconds < before else stuck

    def _back_to_best(self) -> None:
        homes = {group: self.best.device_of[members[0]] for group, members in enumerate(self._graph.groups)}
        clock = run(self._graph, self._cluster, self._costs, self.best.device_of, self.best.order)
        self._take(list(self.best.device_of), list(self.best.order), homes, clock)

    def _ends_by(self, limit: float, device_of: list[int], order: list[int]) -> bool:
        """Whether the changed placement may end by `limit`: what `run` would say, but only from the first change on, and given up early.

        With one channel for each device it says yes, for there a change reaches back.
        """
        if self._cluster.serial:
            return True
        ends, parents, send = self._clock.end[:], self._graph.parents, self._costs.send
        free, latest, same = [0.0] * len(self._left), self._latest, True
        for at, before in zip(order, self._order, strict=True):
            device = device_of[at]
            if same and at == before and device == self._device_of[at]:
                free[device] = ends[at]
                continue
            same, begin = False, free[device]
            for parent in parents[at]:
                there = ends[parent]
                source = device_of[parent]
                if source != device:
                    there += send[source][device][parent]
                if there > begin:
                    begin = there
            free[device] = ends[at] = end = begin + self._costs.run[device][at]
            if end > limit - latest[at]:
                return False
        return True

    def _moved(self) -> tuple[list[int], list[int], dict[int, int]] | None:
        among = self._critical if self._chance.random() < 0.7 else range(len(self._home))
        new_homes = self._moves.parted if self._chance.random() < _PARTED else self._moves.patch
        homes = new_homes(self._home, self._left, among)
        if homes is None:
            return None
        device_of = self._device_of[:]
        for group, device in homes.items():
            for at in self._graph.groups[group]:
                device_of[at] = device
        return device_of, self._order, homes

    def _reordered(self) -> tuple[list[int], list[int], dict[int, int]] | None:
        if self._chance.random() < 0.7:
            at = self._chance.choice(self._graph.groups[self._chance.choice(self._critical)])
            order = self._moves.shifted(self._order, at)
            return None if order is None else (self._device_of, order, {})
        ranks = ranks_of(self._graph, self._costs, self._device_of)
        if self._chance.random() < 0.85:
            return self._device_of, list(urgent_first(self._graph, ranks)), {}
        found = earliest_task_first(self._graph, self._cluster, [-rank for rank in ranks], self._by, self._device_of)
        return None if found is None else (self._device_of, list(found.order), {})

    def _fits(self, device_of: list[int], clock: Clock) -> bool:
        if self._only_lasting:
            return True
        steps = held(self._graph, len(self._left), device_of, clock.start, clock.end, clock.sent)
        return inside(self._cluster, (max(size for _, size in on) for on in steps))

    def _take(self, device_of: list[int], order: list[int], homes: dict[int, int], clock: Clock) -> None:
        for group, device in homes.items():
            self._left[self._home[group]] += self._moves.sizes[group]
            self._left[device] -= self._moves.sizes[group]
            self._home[group] = device
        self._device_of, self._order, self._clock, self._seconds = device_of, order, clock, clock.makespan
        self._critical = self._critical_path()
        if clock.makespan < self._best_seconds:
            self.best, self._best_seconds = Placement(tuple(device_of), tuple(order), self._by), clock.makespan

    def _critical_path(self) -> list[int]:
        """The groups of operators that, one after the other, determine the makespan, and what held each of them up."""
        start, end, before = self._clock.start, self._clock.end, {}
        last = [-1] * len(self._left)
        for at in self._order:
            before[at] = last[self._device_of[at]]
            last[self._device_of[at]] = at
        at, found = max(range(len(end)), key=end.__getitem__), {}
        while True:
            found[self._moves.group[at]] = None
            if before[at] >= 0 and end[before[at]] >= start[at]:
                at = before[at]
                continue
            here = self._device_of[at]
            arrivals = [(end[p] if self._device_of[p] == here else self._clock.sent[p, here][1], p) for p in self._graph.parents[at]]
            if not arrivals:
                return list(found)
            at = max(arrivals)[1]
