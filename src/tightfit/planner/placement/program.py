"""Program: the integer program of a makespan: which group is where, what runs before what, and which outputs travel.

Times are shares of a makespan that is known to be possible. Of two operators on one device, one is over before the other starts; for two
that no path connects and whose windows overlap, a whole number says which (disjunctive formulation with big M from the windows).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from tightfit.planner.placement.earliest import earliest_starts, latest_tails
from tightfit.planner.placement.moments import moments
from tightfit.planner.placement.orders import group_of
from tightfit.planner.placement.pack import by_operator
from tightfit.planner.placement.times import Times, times
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph
from tightfit.terms.placement import Placement


@dataclass(frozen=True)
class Program:
    """Minimise `costs` · x with `rows` · x >= `least` and `low` <= x <= `high`, whole where `whole` is 1."""

    graph: Graph
    devices: int
    costs: Any  # (columns,)
    rows: Any  # (rows, columns), sparse
    least: Any  # (rows,)
    low: Any  # (columns,)
    high: Any
    whole: Any

    def solve(self, seconds_limit: float) -> Any:
        """What HiGHS finds and proves within `seconds_limit`: scipy's `OptimizeResult`, whose `x` is None where nothing was found."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        return milp(
            self.costs,
            constraints=LinearConstraint(self.rows, self.least, float("inf")),  # type: ignore[arg-type]
            integrality=self.whole,
            bounds=Bounds(self.low, self.high),  # type: ignore[arg-type]
            options={"time_limit": seconds_limit, "mip_rel_gap": 1e-6},
        )

    def without(self, x: Sequence[float]) -> "Program":
        """The same program, without every solution that has the homes of `x`."""
        import numpy as np
        from scipy.sparse import coo_array, vstack

        homes = self._homes(x)
        columns = [group * self.devices + home for group, home in enumerate(homes)]
        elsewhere = coo_array((np.full(len(homes), -1.0), (np.zeros(len(homes), int), columns)), shape=(1, len(self.low)))
        rows = vstack([self.rows, elsewhere]).tocsr()
        return replace(self, rows=rows, least=np.append(self.least, 1.0 - len(homes)))

    def placement(self, x: Sequence[float]) -> Placement:
        """What a solution says: the devices, and the operators by start; what starts at one time stays in topological order."""
        groups, devices, homes = len(self.graph.groups), self.devices, self._homes(x)
        starts = x[groups * devices : groups * devices + len(self.graph.operators)]
        order, sooner = [], list(starts)
        for at in self.graph.order:  # within the solver's tolerance a reader may start before what it reads ends
            sooner[at] = max([starts[at], *(sooner[parent] for parent in self.graph.parents[at])])
        order = sorted(self.graph.order, key=lambda at: sooner[at])
        return Placement(tuple(by_operator(self.graph, homes)), tuple(order), "exact")

    def _homes(self, x: Sequence[float]) -> list[int]:
        """The device of each group: the first columns are one for each group and device."""
        devices = range(self.devices)
        return [max(devices, key=lambda device: x[group * self.devices + device]) for group in range(len(self.graph.groups))]


class _Rows:
    """Rows and columns of a program that grows."""

    def __init__(self) -> None:
        self.low: list[float] = []
        self.high: list[float] = []
        self.whole: list[int] = []
        self.least: list[float] = []
        self._entries: tuple[list[int], list[int], list[float]] = ([], [], [])

    def column(self, low: float, high: float, whole: bool = False) -> int:
        self.low.append(low)
        self.high.append(high)
        self.whole.append(int(whole))
        return len(self.low) - 1

    def row(self, least: float, *terms: tuple[int, float]) -> None:
        """The sum of factors times columns is at least `least`."""
        for column, factor in terms:
            for entries, value in zip(self._entries, (len(self.least), column, factor), strict=True):
                entries.append(value)  # type: ignore[arg-type]
        self.least.append(least)

    def matrix(self) -> Any:
        from scipy.sparse import coo_array

        rows, columns, factors = self._entries
        return coo_array((factors, (rows, columns)), shape=(len(self.least), len(self.low))).tocsr()


def formulate(graph: Graph, cluster: Cluster, best: float) -> Program:
    """The program of all placements that take `best` seconds or fewer."""
    import numpy as np

    costs, rows = times(graph, cluster), _Rows()
    before, after = ([value / best for value in values] for values in (earliest_starts(graph, costs), latest_tails(graph, costs)))
    run = [[value / best for value in on] for on in costs.run]
    at_home = _homes(graph, cluster, rows)
    group = group_of(graph)
    takes = [[(at_home[group[at]][device], on[at]) for device, on in enumerate(run)] for at in range(len(group))]
    start = [rows.column(before[at], max(before[at], 1 - after[at] - min(on[at] for on in run))) for at in range(len(group))]
    end = rows.column(0, 1)
    for at in range(len(group)):
        rows.row(after[at], (end, 1), (start[at], -1), *((column, -seconds) for column, seconds in takes[at]))
    _loads(graph, rows, at_home, run, before, after, end)
    _transfers(graph, costs, best, rows, at_home, takes, start)
    _turns(graph, rows, at_home, takes, start, before, after)
    objective = np.zeros(len(rows.low))
    objective[end] = 1
    columns = (np.array(values, dtype=float) for values in (rows.low, rows.high, rows.whole))
    return Program(graph, len(run), objective, rows.matrix(), np.array(rows.least), *columns)


def _homes(graph: Graph, cluster: Cluster, rows: _Rows) -> list[list[int]]:
    """A column for each group and device; of devices that are alike, the heaviest groups open one after the other."""
    sizes, count = [max(at_once) for at_once in zip(*moments(graph), strict=True)], len(cluster.devices)
    alike = not cluster.links and len({(device.memory_bytes, device.speed) for device in cluster.devices}) == 1
    work = [sum(graph.operators[at].seconds for at in members) for members in graph.groups]
    rank = {group: place for place, group in enumerate(sorted(range(len(sizes)), key=lambda group: (-sizes[group], -work[group], group)))}
    found = [
        [rows.column(0, 0 if alike and device > rank[group] else 1, whole=True) for device in range(count)] for group in range(len(sizes))
    ]
    for columns in found:
        rows.row(1, *((column, 1) for column in columns))
        rows.row(-1, *((column, -1) for column in columns))
    scale = max(1, *(device.memory_bytes for device in cluster.devices))
    for at_once in moments(graph):
        for number, device in enumerate(cluster.devices):
            used = ((columns[number], -size / scale) for columns, size in zip(found, at_once, strict=True) if size)
            rows.row(-device.memory_bytes / scale, *used)
    return found


def _loads(
    graph: Graph,
    rows: _Rows,
    at_home: list[list[int]],
    run: list[list[float]],
    before: list[float],
    after: list[float],
    end: int,
) -> None:
    """A device takes at least its work, after the soonest start of all and before the least remainder of all."""
    for device, on in enumerate(run):
        works = [(columns[device], -sum(on[at] for at in members)) for columns, members in zip(at_home, graph.groups, strict=True)]
        rows.row(min(before) + min(after), (end, 1), *works)


def _transfers(
    graph: Graph,
    costs: Times,
    best: float,
    rows: _Rows,
    at_home: list[list[int]],
    takes: list[list[tuple[int, float]]],
    start: list[int],
) -> None:
    """A reader starts after the end of what it reads, and after the transfer where they are apart."""
    group, devices = group_of(graph), range(len(at_home[0]))
    apart: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # by pair of groups: column, and from where to where (-1: any)
    one_link = len({costs.send[source][target] for source in devices for target in devices if source != target}) <= 1
    for parent, child in dict.fromkeys(graph.edges):
        pair = group[parent], group[child]
        if pair[0] != pair[1] and pair not in apart:
            apart[pair] = []
            for source in devices:
                if one_link:
                    column = apart[pair][0][0] if apart[pair] else rows.column(0, 1)
                    apart[pair] = [(column, -1, -1)]
                    rows.row(0, (column, 1), (at_home[pair[0]][source], -1), (at_home[pair[1]][source], 1))
                    continue
                for target in devices:
                    if source != target:
                        apart[pair].append((rows.column(0, 1), source, target))
                        rows.row(-1, (apart[pair][-1][0], 1), (at_home[pair[0]][source], -1), (at_home[pair[1]][target], -1))
        sends = []
        for column, source, target in apart.get(pair, ()):
            seconds = costs.fastest_send[parent] if source < 0 else costs.send[source][target][parent]
            sends.append((column, -seconds / best))
        rows.row(0, (start[child], 1), (start[parent], -1), *((column, -seconds) for column, seconds in takes[parent]), *sends)


def _turns(
    graph: Graph,
    rows: _Rows,
    at_home: list[list[int]],
    takes: list[list[tuple[int, float]]],
    start: list[int],
    before: list[float],
    after: list[float],
) -> None:
    """Of two operators without a path between them, on one device, one runs after the other."""
    group, reaches = group_of(graph), _reaches(graph)
    timed = [any(seconds for _, seconds in on) for on in takes]
    together: dict[tuple[int, int], int] = {}  # 1 where two groups are on one device
    for one, other in combinations(range(len(group)), 2):
        if reaches[one] >> other & 1 or reaches[other] >> one & 1 or not timed[one] or not timed[other]:
            continue
        slack = [1 - after[first] - before[second] for first, second in ((one, other), (other, one))]  # what big M must cover
        if min(slack) <= 0:
            continue
        turn = rows.column(0, 1, whole=True)
        pair = (min(group[one], group[other]), max(group[one], group[other]))
        if pair[0] != pair[1] and pair not in together:
            together[pair] = rows.column(0, 1)
            for columns in zip(at_home[pair[0]], at_home[pair[1]], strict=True):
                rows.row(-1, (together[pair], 1), *((column, -1) for column in columns))
        apart = pair[0] != pair[1]
        for first, second, much, its_turn in ((one, other, slack[0], True), (other, one, slack[1], False)):
            # start(second) >= end(first), less `much` where it is not their turn, and less `much` where they are apart
            terms = [(start[second], 1.0), (start[first], -1.0), *((column, -seconds) for column, seconds in takes[first])]
            terms.append((turn, -much if its_turn else much))
            terms += [(together[pair], -much)] if apart else []
            rows.row(-much * (its_turn + apart), *terms)


def _reaches(graph: Graph) -> list[int]:
    """For each operator, as bits, all that a path leads to."""
    found = [0] * len(graph.operators)
    for at in reversed(graph.order):
        for child in graph.children[at]:
            found[at] |= found[child] | 1 << child
    return found
