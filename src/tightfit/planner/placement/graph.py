"""Graph: the same step with fewer operators, and the way back. Placing that is quicker, and keeps together what belongs together."""

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tightfit.planner.placement.orders import group_of, topological
from tightfit.terms.errors import TightfitError
from tightfit.terms.graph import Graph, Operator
from tightfit.terms.placement import Placement


@dataclass(frozen=True)
class Smaller:
    """A graph whose operators each stand for `members` of the whole one; `behind` run after all of them, where their group is."""

    graph: Graph
    members: tuple[tuple[int, ...], ...]  # by operator of the smaller graph, in the order in which they run
    behind: tuple[tuple[int, int], ...] = ()  # an operator of the whole graph, and that of the smaller one whose device it shares

    def expand(self, placement: Placement) -> Placement:
        """The placement of the whole graph that `placement` of the smaller one stands for."""
        home = {at: placement.device_of[small] for small, members in enumerate(self.members) for at in members}
        home |= {at: placement.device_of[small] for at, small in self.behind}
        order = (*(at for small in placement.order for at in self.members[small]), *(at for at, _ in self.behind))
        return Placement(tuple(home[at] for at in range(len(home))), order, placement.by)

    def shrink(self, placement: Placement) -> Placement:
        """The placement of the smaller graph nearest to `placement` of the whole: each group where most of its work is."""
        device_of = [0] * len(self.members)
        for group in self.graph.groups:
            work: dict[int, float] = defaultdict(float)
            for small in group:
                for at in self.members[small]:
                    work[placement.device_of[at]] += self.graph.operators[small].seconds / len(self.members[small])
            home = max(work, key=work.__getitem__)
            for small in group:
                device_of[small] = home
        place = {at: number for number, at in enumerate(placement.order)}
        order = topological(self.graph, lambda small: (place[self.members[small][0]], small))  # members may stand far apart in the whole
        return Placement(tuple(device_of), order, placement.by)


def co_placed(graph: Graph, most_bytes: float = float("inf"), most_seconds: float = float("inf")) -> Graph:
    """The same operators in larger groups: each with one reader shares the group of that reader (Baechi, SoCC 2020: co-placement).

    No group grows past `most_bytes` that last or `most_seconds` of work; a chain would else be one group.
    """
    group, lead = group_of(graph), list(range(len(graph.groups)))
    sizes = [sum(graph.operators[at].weight_bytes + graph.operators[at].kept_bytes for at in members) for members in graph.groups]
    works = [sum(graph.operators[at].seconds for at in members) for members in graph.groups]

    def root(number: int) -> int:
        while lead[number] != number:
            lead[number] = lead[lead[number]]
            number = lead[number]
        return number

    for at in graph.order:
        if len(graph.children[at]) == 1:
            one, other = root(group[at]), root(group[graph.children[at][0]])
            if one != other and sizes[one] + sizes[other] <= most_bytes and works[one] + works[other] <= most_seconds:
                lead[one] = other
                sizes[other] += sizes[one]
                works[other] += works[one]
    together: dict[int, list[int]] = {}
    for number in range(len(lead)):
        together.setdefault(root(number), []).append(number)
    taken = {operator.group for operator in graph.operators}
    operators = list(graph.operators)
    for numbers in together.values():
        members = [at for number in numbers for at in graph.groups[number]]
        if len(numbers) > 1:
            name = next((operators[at].group for at in members if operators[at].group), "") or _free(operators[members[0]].name, taken)
            for at in members:
                operators[at] = replace(operators[at], group=name)
    return replace(graph, operators=tuple(operators))


def fused(graph: Graph) -> Smaller:
    """Operators of one group that follow on each other as one (Baechi, SoCC 2020: operator fusion).

    An edge u → v is contracted unless u has other children and v other parents: then a second way could lead from u to v, and close a
    circle. Without transfers that disturb each other, the expanded placement ends no later; what it holds is for `simulate` to judge,
    for outputs leave earlier than from the fused operator.
    """
    return _contracted(graph, _Contraction(graph).members())


def chains(graph: Graph, most_bytes: float = float("inf"), most_seconds: float = float("inf")) -> Smaller:
    """Operators whose one reader reads nothing else as one with it, unless their groups differ.

    The expanded placement runs and sends exactly when that of the smaller graph does, and never holds more; so what fits stays fitting.
    """
    head = list(range(len(graph.operators)))  # of the chain that each operator is in
    sizes = [one.weight_bytes + one.kept_bytes for one in graph.operators]
    works, groups = [one.seconds for one in graph.operators], _shared(graph)
    members = {at: [at] for at in head}
    for at in graph.order:
        if len(graph.parents[at]) != 1 or len(graph.children[graph.parents[at][0]]) != 1:
            continue
        first = head[graph.parents[at][0]]
        alike = groups[first] == groups[at] or not groups[first] or not groups[at]
        small = sizes[first] + sizes[at] <= most_bytes and works[first] + works[at] <= most_seconds
        if alike and small and _same_measure(graph, first, at):
            head[at], groups[first] = first, groups[first] or groups[at]
            sizes[first] += sizes[at]
            works[first] += works[at]
            members[first] += members.pop(at)
    return _contracted(graph, list(members.values()))


def forward_only(graph: Graph) -> Smaller:
    """The forward operators alone; each backward one goes where its group, or what it reads, is (Baechi, SoCC 2020).

    What a group's backward leaves on the device, its first forward operator leaves. Raises `TightfitError` where a forward operator reads
    a backward one, or nothing is forward.
    """
    forward = [at for at in graph.order if not graph.operators[at].backward]
    if not forward or any(graph.operators[parent].backward for at in forward for parent in graph.parents[at]):
        raise TightfitError(f"`{graph.name}` has no forward part of its own", hint="mark as `backward` only what runs after the forward")
    number = {at: small for small, at in enumerate(forward)}
    group, follows = group_of(graph), dict(number)
    of_group = {group[at]: number[at] for at in reversed(forward)}
    operators = [graph.operators[at] for at in forward]
    for at in graph.order:
        if at not in number:
            small = of_group.get(group[at], follows[graph.parents[at][0]] if graph.parents[at] else 0)
            of_group[group[at]] = follows[at] = small
            one = operators[small]
            lasts = graph.operators[at].weight_bytes + graph.operators[at].kept_bytes
            operators[small] = replace(one, weight_bytes=one.weight_bytes + lasts)
    edges = tuple((number[source], number[target]) for source, target in graph.edges if target in number)
    behind = tuple((at, follows[at]) for at in graph.order if at not in number)
    return Smaller(replace(graph, operators=tuple(operators), edges=edges), tuple((at,) for at in forward), behind)


class _Contraction:
    """Operators that melt into each other: who reads whom among what is left, and what each stands for."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._parents = [set(parents) for parents in graph.parents]
        self._children = [set(children) for children in graph.children]
        self._members: list[deque[int]] = [deque([at]) for at in range(len(graph.operators))]
        self._melted = [False] * len(graph.operators)
        look = deque(graph.order)
        while look:
            at = look.popleft()
            child = None if self._melted[at] else next((child for child in sorted(self._children[at]) if self._may(at, child)), None)
            if child is not None:
                left = self._melt(at, child)
                look.extend((left, *sorted(self._parents[left])))

    def members(self) -> list[list[int]]:
        """The operators that each one left stands for, in the order in which they run."""
        return [list(members) for members, melted in zip(self._members, self._melted, strict=True) if not melted]

    def _may(self, at: int, child: int) -> bool:
        one, other = self._graph.operators[at], self._graph.operators[child]
        if not one.group or one.group != other.group or not _same_measure(self._graph, at, child):
            return False
        return len(self._children[at]) == 1 or len(self._parents[child]) == 1

    def _melt(self, at: int, child: int) -> int:
        """The two as one; whichever has more neighbours stays."""
        degree = [len(self._parents[end]) + len(self._children[end]) for end in (at, child)]
        stays, goes = (at, child) if degree[0] >= degree[1] else (child, at)
        for parent in self._parents[goes] - {stays}:
            self._children[parent].discard(goes)
            self._children[parent].add(stays)
        for reader in self._children[goes] - {stays}:
            self._parents[reader].discard(goes)
            self._parents[reader].add(stays)
        self._parents[stays] = (self._parents[stays] | self._parents[goes]) - {stays, goes}
        self._children[stays] = (self._children[stays] | self._children[goes]) - {stays, goes}
        if stays == at:
            self._members[stays].extend(self._members[goes])
        else:
            self._members[stays].extendleft(reversed(self._members[goes]))
        self._melted[goes] = True
        return stays


def _contracted(graph: Graph, members: Sequence[Sequence[int]]) -> Smaller:
    number = {at: small for small, inside in enumerate(members) for at in inside}
    shared = _shared(graph)
    operators = tuple(_melted(graph, shared, inside) for inside in members)
    edges = {(number[source], number[target]): None for source, target in graph.edges if number[source] != number[target]}
    return Smaller(Graph(graph.name, operators, tuple(edges)), tuple(map(tuple, members)))


def _melted(graph: Graph, shared: Sequence[str], members: Sequence[int]) -> Operator:
    """One operator for `members`: from its start on it holds at least what any of them holds at its time."""
    if len(members) == 1:
        return graph.operators[members[0]]
    inside, all_of = set(members), [graph.operators[at] for at in members]
    leaves = [not inside.issuperset(graph.children[at]) for at in members]
    kept = [one.kept_bytes + (0 if graph.children[at] else one.output_bytes) for at, one in zip(members, all_of, strict=True)]
    goes = [one.output_bytes if out else 0 for one, out in zip(all_of, leaves, strict=True)]
    place = {at: number for number, at in enumerate(members)}
    held, ends = 0, [0] * len(members)  # outputs that are read inside alone, until their last reader ends
    peak, later = 0, sum(kept) + sum(goes)
    for number, (at, one) in enumerate(zip(members, all_of, strict=True)):
        later -= kept[number] + goes[number]
        if graph.children[at] and not leaves[number]:
            held += one.output_bytes
            ends[max(place[child] for child in graph.children[at])] += one.output_bytes
        peak = max(peak, held + one.temporary_bytes - later)
        held -= ends[number]
    sends = [one.transfer_seconds for one, out in zip(all_of, leaves, strict=True) if out]
    return Operator(
        name=f"{all_of[0].name} … {all_of[-1].name}",
        seconds=sum(one.seconds for one in all_of),
        weight_bytes=sum(one.weight_bytes for one in all_of),
        kept_bytes=sum(kept),
        temporary_bytes=peak,
        output_bytes=sum(goes),
        transfer_seconds=sum(seconds for seconds in sends if seconds is not None) if all_of[0].transfer_seconds is not None else None,
        group=next((name for name in (shared[at] for at in members) if name), all_of[0].group),
        backward=all(one.backward for one in all_of),
    )


def _shared(graph: Graph) -> list[str]:
    """The group of each operator, or nothing where it is alone in it: that binds it to none."""
    sizes = Counter(one.group for one in graph.operators)
    return [one.group if sizes[one.group] > 1 else "" for one in graph.operators]


def _same_measure(graph: Graph, one: int, other: int) -> bool:
    """Both outputs are told in seconds, or both in bytes: a mix of them cannot be told as one."""
    return (graph.operators[one].transfer_seconds is None) == (graph.operators[other].transfer_seconds is None)


def _free(name: str, taken: set[str]) -> str:
    """A group's name that no other group has."""
    while name in taken:
        name += "'"
    taken.add(name)
    return name
