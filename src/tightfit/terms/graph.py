"""Graph: the operators of one step of a model, what each costs, and which reads what. Who captured or read it does not matter here."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from tightfit.terms.errors import TightfitError


@dataclass(frozen=True)
class Operator:
    """One operator. What it takes on the device that runs it, by how long it is there."""

    name: str
    seconds: float  # on a device of speed 1
    weight_bytes: int = 0  # for good: parameters, and with them gradients and optimizer state while training
    kept_bytes: int = 0  # from its start to the end of the step: what a backward that is not in the graph will read
    temporary_bytes: int = 0  # only while it runs
    output_bytes: int = 0  # from its start until its last reader has run, there and on every other device that reads it
    transfer_seconds: float | None = None  # to send the output once, where a file says time instead of bytes
    group: str = ""  # operators of one group go to one device; "": free
    backward: bool = False


@dataclass(frozen=True)
class Graph:
    """Operators, and edges (reader after writer) as pairs of their numbers: a directed graph without a circle.

    Raises `TightfitError` for edges that name no operator, circles, and costs below zero or not finite.
    """

    name: str
    operators: tuple[Operator, ...]
    edges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.operators:
            raise TightfitError(f"the graph `{self.name}` has no operators")
        for operator in self.operators:
            _refuse_costs(operator)
        for source, target in self.edges:
            if not (0 <= source < len(self.operators) and 0 <= target < len(self.operators)):
                raise TightfitError(f"the graph `{self.name}` has an edge {source} → {target}, and {len(self.operators)} operators")
        if len(self.order) < len(self.operators):
            raise TightfitError(
                f"the graph `{self.name}` has a circle through {_some(self.operators[at].name for at in self._circle())}",
                hint="an operator can only read what ran before it; cut the edge that leads back",
            )

    @cached_property
    def parents(self) -> tuple[tuple[int, ...], ...]:
        """The operators that each one reads, without repeats."""
        found: list[dict[int, None]] = [{} for _ in self.operators]
        for source, target in self.edges:
            found[target][source] = None
        return tuple(tuple(sources) for sources in found)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The operators that read each one, without repeats."""
        found: list[dict[int, None]] = [{} for _ in self.operators]
        for source, target in self.edges:
            found[source][target] = None
        return tuple(tuple(targets) for targets in found)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """A topological order: Kahn's, first in, first out. It leaves out what lies on a circle or behind one."""
        waits = [len(parents) for parents in self.parents]
        order = [at for at, count in enumerate(waits) if not count]
        for at in order:
            for child in self.children[at]:
                waits[child] -= 1
                if not waits[child]:
                    order.append(child)
        return tuple(order)

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The operators of each group, and each free operator by itself; in the order in which the first of them stands."""
        found: dict[str | int, list[int]] = {}
        for at, operator in enumerate(self.operators):
            found.setdefault(operator.group or at, []).append(at)
        return tuple(tuple(members) for members in found.values())

    @property
    def seconds(self) -> float:
        """The work of all operators, on one device of speed 1."""
        return sum(operator.seconds for operator in self.operators)

    @property
    def weight_bytes(self) -> int:
        """What is there for good, over all operators."""
        return sum(operator.weight_bytes for operator in self.operators)

    def _circle(self) -> list[int]:
        """The operators of one circle, by walking back among what the order left out."""
        left = set(range(len(self.operators))) - set(self.order)
        walk, seen = [min(left)], Counter[int]()
        while not seen[walk[-1]]:
            seen[walk[-1]] += 1
            walk.append(next(parent for parent in self.parents[walk[-1]] if parent in left))
        return walk[walk.index(walk[-1]) + 1 :][::-1]


def _refuse_costs(operator: Operator) -> None:
    costs = {
        "seconds": operator.seconds,
        "weight_bytes": operator.weight_bytes,
        "kept_bytes": operator.kept_bytes,
        "temporary_bytes": operator.temporary_bytes,
        "output_bytes": operator.output_bytes,
        "transfer_seconds": operator.transfer_seconds or 0.0,
    }
    for name, cost in costs.items():
        if not 0 <= cost < float("inf"):
            raise TightfitError(f"the operator `{operator.name}` has {name} of {cost:g}", hint="costs are finite, and zero or more")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(f"`{name}`" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
