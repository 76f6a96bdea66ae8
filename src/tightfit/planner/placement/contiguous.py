"""Contiguous: a split into stages through which data flows one way, so that a pipeline can run it.

The dynamic program over all ideals is exact. Where they are too many, it runs over those along linear orders, then over these and all that
differ from the cuts of the best split so far by one atom, again and again: a local search whose neighbourhood is searched to the end.
"""

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from tightfit.planner.placement.atoms import Atoms, stage_atoms
from tightfit.planner.placement.folding import coarse, fold
from tightfit.planner.placement.ideals import all_ideals, along, closures, linear_orders, nearby, prefixes
from tightfit.planner.placement.load import held_bytes, load
from tightfit.planner.placement.memory import inside
from tightfit.planner.placement.narrowest import narrowest_ideals
from tightfit.planner.placement.splitting import Kind, OutOfTime, Split, Stage, best_split, kinds_of
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph

_MOST_CUTS = 500  # along one linear order, before a first split is known
_MOST_ATOMS = 2500  # beyond, atoms only go along linear orders, in so many pieces
_FIRST_SECONDS = 3.0  # for a first split, even if the limit is lower
_REFUSALS = 25  # times that a split whose stages overflow is sought anew
_QUIET = 10  # rounds around the best cuts without gain


@dataclass(frozen=True)
class Contiguous:
    """The best contiguous split that was found."""

    device_of: tuple[int, ...]  # by operator
    seconds: float  # the largest load
    bound_seconds: float  # no contiguous split is below; 0 where nothing is known

    @property
    def optimal(self) -> bool:
        """No contiguous split is better."""
        return self.seconds <= self.bound_seconds * (1 + 1e-9)


def contiguous(graph: Graph, cluster: Cluster, seconds_limit: float = 10.0, most_ideals: int = 60_000, seed: int = 0) -> Contiguous | None:
    """The contiguous split with the least largest load, over all orders of unlike devices; None where none was found that fits.

    Optimal where the graph has at most `most_ideals` ideals once it is folded, all links are alike and time suffices. Where memory is
    short, the optimum of ample memory is a bound. Takes about `seconds_limit` seconds at most. Deterministic for a
    seed where time does not end it. Source: Tarnawski et al., NeurIPS 2020, section 4.
    """
    began = time.perf_counter()
    search = _Search(graph, cluster, most_ideals, seed, began + seconds_limit, began + max(seconds_limit, _FIRST_SECONDS))
    links = (cluster.link, *sorted(cluster.links.values(), key=lambda link: (link.bytes_per_second, -link.latency_seconds)))
    for link in dict.fromkeys((links[0], links[-1], links[min(1, len(links) - 1)])):  # where they differ: the usual, fastest, slowest
        _with_link(search, stage_atoms(graph, replace(cluster, link=link, links={})), began + seconds_limit / 3)
    return Contiguous(search.device_of, search.seconds, min(search.bound, search.seconds)) if search.device_of else None


def _with_link(search: "_Search", atoms: Atoms, first_deadline: float) -> None:
    """Search with memory left out, for a bound and in the hope that it fits; then in folded atoms, and in those that lose nothing."""
    cluster, folded = search.cluster, fold(atoms, ample=True)
    ample = atoms.all_bytes <= min(device.memory_bytes for device in cluster.devices)
    if not ample:
        roomy = replace(cluster, devices=tuple(replace(device, memory_bytes=atoms.all_bytes) for device in cluster.devices))
        freely = _Search(search.graph, roomy, search.most_ideals, search.seed, first_deadline, search.patience)
        freely.run(folded, exact=True)
        search.bound = max(search.bound, freely.bound)
        search.offer(freely.device_of)
    if not search.done:
        search.run(folded, exact=ample)
    if not ample and not search.done:
        search.run(fold(atoms, ample=False), exact=True)


@dataclass
class _Search:
    """The best split so far, and what the search needs."""

    graph: Graph
    cluster: Cluster
    most_ideals: int
    seed: int
    deadline: float
    patience: float  # until when a first split is sought
    device_of: tuple[int, ...] = ()
    seconds: float = float("inf")
    bound: float = 0.0
    atoms: Atoms = field(init=False)
    kinds: tuple[Kind, ...] = field(init=False)
    best: Split | None = None  # of these atoms
    refused: frozenset[Stage] = frozenset()

    def __post_init__(self) -> None:
        self.kinds = kinds_of(self.cluster)

    @property
    def done(self) -> bool:
        """What was found is as good as the bound."""
        return self.seconds <= self.bound * (1 + 1e-9)

    def run(self, atoms: Atoms, exact: bool) -> None:
        """Splits of `atoms`; `exact`: the best of them is the best of the graph."""
        if len(atoms.members) > _MOST_CUTS:
            orders = linear_orders(atoms, shuffles=0)
            try:
                for order in orders if len(atoms.members) > _MOST_ATOMS else orders[:1]:
                    self.turn_to(coarse(atoms, order, _MOST_CUTS))
                    self.first(range(len(self.atoms.members)))
            except OutOfTime:
                return
        if len(atoms.members) <= _MOST_ATOMS:
            self.pieces(atoms, exact)

    def turn_to(self, atoms: Atoms) -> None:
        """From now on ideals are of these atoms."""
        self.atoms, self.best, self.refused = atoms, None, frozenset()

    def first(self, order: Sequence[int]) -> None:
        """Splits along one order; while none is known, as long as patience lasts."""
        deadline = self.deadline
        if not self.device_of:
            self.deadline = max(deadline, self.patience)
        self.take(prefixes(order))
        self.deadline = deadline

    def pieces(self, atoms: Atoms, exact: bool) -> None:
        """Linear orders, then all ideals, or the narrowest and those around the best cuts until nothing gets better."""
        count, orders = len(atoms.members), linear_orders(atoms, seed=self.seed)
        pool = list(dict.fromkeys(ideal for order in orders for ideal in prefixes(order)))
        try:
            self.turn_to(atoms)
            if count <= _MOST_CUTS or not self.device_of:
                self.first(orders[0])
            every = all_ideals(atoms, self.most_ideals)
            if every is None:
                self.take(_family(count, self.narrow(orders[:3]), prefixes(orders[0])[:: 1 + count // 300]))
                self.around(pool, orders)
                return
            self.take(pool)
            bound = self.take(every, _REFUSALS)
            if exact and not self.cluster.links:
                self.bound = max(self.bound, bound)
        except OutOfTime:
            pass

    def narrow(self, orders: Sequence[Sequence[int]]) -> list[int]:
        """The narrowest ideals within windows of the orders, as long as there is time."""
        count, found = len(self.atoms.members), []
        for order in orders:
            for width in (count // 24, count // 6):
                if time.perf_counter() < self.deadline:
                    found += narrowest_ideals(self.atoms, order, width)
        return found

    def around(self, pool: Sequence[int], orders: Sequence[Sequence[int]]) -> None:
        """Ideals one atom away from the cuts of the best split, then some that are two away, until neither gives a better one."""
        behind, ahead = closures(self.atoms)
        shuffled = random.Random(self.seed)
        count, quiet = len(self.atoms.members), 0
        while self.best and quiet < _QUIET:
            before = self.seconds
            cuts = [stage.after for stage in self.best.stages[:-1]]
            close = [ideal for cut in cuts for ideal in nearby(cut, behind, ahead, range(count))]
            close += [ideal for cut in cuts for order in orders for ideal in along(cut, behind, ahead, order)]
            if quiet:
                seeds = shuffled.sample(close, min(len(close), 24))
                close += [ideal for cut in seeds for ideal in nearby(cut, behind, ahead, range(count))]
            self.take(_family(count, close, pool if quiet == 1 else ()))
            quiet = 0 if self.seconds < before else quiet + 1

    def offer(self, device_of: tuple[int, ...]) -> None:
        """Keep a split that was found elsewhere, if it fits."""
        if device_of and inside(self.cluster, held_bytes(self.graph, self.cluster, device_of)):
            seconds = max(load(self.graph, self.cluster, device_of))
            self.device_of, self.seconds = min((self.device_of, self.seconds), (device_of, seconds), key=lambda split: split[1])

    def take(self, ideals: Sequence[int], refusals: int = 3) -> float:
        """Keep the best split along `ideals` if it is better than the best so far; what no split along them, nor that, is below.

        Memory is first counted as low as it can be. Where that gives splits that overflow, their stages are refused; where that does not
        end, memory is counted higher.
        """
        ideals, least = sorted(ideals, key=int.bit_count), 0.0
        for crowded in (0.0, 1.0, 0.5, 0.75, 0.25):
            for _ in range(1 if crowded == 1 else refusals):
                split = self._split(ideals, crowded)
                least = least if crowded else min(self.seconds, split.seconds if split else self.seconds)
                if split is None or self._keep(split):
                    break
                self.refused |= self._overflowing(split)
            else:
                continue
            if not crowded:
                return self.seconds
        return least

    def _split(self, ideals: Sequence[int], crowded: float) -> Split | None:
        below = min(self.seconds, _ceiling(self.atoms, self.kinds)) * (1 - 1e-9)
        return best_split(self.atoms, ideals, self.kinds, below, self.deadline, crowded, self.refused)

    def _keep(self, split: Split) -> bool:
        """Keep a split if it fits; its largest load is what the links really give."""
        device_of, held = self._spread(split)
        if not inside(self.cluster, held):
            return False
        device_of, seconds = _settled(self.graph, self.cluster, self.kinds, device_of)
        if seconds < self.seconds:
            self.best, self.device_of, self.seconds = split, device_of, seconds
        return True

    def _spread(self, split: Split) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The device of each operator, and what each device then holds at most."""
        left = [list(kind.devices) for kind in self.kinds]
        atom_device = [0] * len(self.atoms.members)
        for stage in split.stages:
            device = left[stage.kind].pop(0)
            for atom in _bits(stage.after & ~stage.before):
                atom_device[atom] = device
        device_of = self.atoms.spread(atom_device)
        return device_of, held_bytes(self.graph, self.cluster, device_of)

    def _overflowing(self, split: Split) -> frozenset[Stage]:
        """The stages that do not fit, on every kind of device that is too small for what they hold."""
        device_of, held = self._spread(split)
        found = set()
        for stage in split.stages:
            first = next(_bits(stage.after & ~stage.before))
            have = held[device_of[self.atoms.members[first][0]]]
            for number, kind in enumerate(self.kinds):
                if have > kind.memory_bytes:
                    found.add(Stage(number, stage.before, stage.after))
        return frozenset(found)


def _settled(graph: Graph, cluster: Cluster, kinds: Iterable[Kind], device_of: tuple[int, ...]) -> tuple[tuple[int, ...], float]:
    """The same stages on other devices of their kind, where links differ and that is better; and the largest load."""
    seconds = max(load(graph, cluster, device_of))
    better = bool(cluster.links)
    while better:
        better = False
        for one, other in (pair for kind in kinds for pair in combinations(kind.devices, 2)):
            swapped = tuple(other if device == one else one if device == other else device for device in device_of)
            found = max(load(graph, cluster, swapped))
            if found < seconds * (1 - 1e-9):
                device_of, seconds, better = swapped, found, True
    return device_of, seconds


def _family(count: int, *many: Iterable[int]) -> list[int]:
    """The empty ideal, the full one, and all of `many`, without repeats."""
    return list(dict.fromkeys([0, (1 << count) - 1, *(ideal for some in many for ideal in some)]))


def _ceiling(atoms: Atoms, kinds: Iterable[Kind]) -> float:
    """No stage's load reaches this many seconds."""
    sent = sum(output.seconds for output in atoms.outputs)
    return 2 * (sum(atoms.seconds) / min(kind.speed for kind in kinds) + sent) + 1e-9


def _bits(ideal: int) -> Iterator[int]:
    while ideal:
        low = ideal & -ideal
        yield low.bit_length() - 1
        ideal ^= low
