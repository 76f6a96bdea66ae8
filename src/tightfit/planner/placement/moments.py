"""Moments: what is on the devices at one and the same time, whatever the placement. For bounds that memory gives."""

from tightfit.planner.placement.orders import group_of
from tightfit.planner.placement.pack import group_bytes
from tightfit.terms.graph import Graph

_MOST_OPERATORS = 4000  # a square of so many truth values is 16 MB


def moments(graph: Graph) -> list[list[int]]:
    """Bytes that each of `graph.groups` has on its device: at the end of the step, and when the operator starts that most waits beside.

    When an operator starts, all that leads to it has run. An output of that is still there if an operator of the same group reads it, and
    runs then or after: so do, while training, the outputs that the backward reads. At either moment the groups of a device fit together.
    """
    end = group_bytes(graph)
    count = len(graph.operators)
    group = group_of(graph)
    pairs = [
        (at, [r for r in readers if group[r] == group[at] and graph.operators[r].seconds > 0]) for at, readers in enumerate(graph.children)
    ]
    stays = [(at, readers) for at, readers in pairs if readers and graph.operators[at].output_bytes]
    if not stays or count > _MOST_OPERATORS:
        return [end]
    import numpy as np

    after = np.zeros((count, count), dtype=bool)  # [operator, another]: a path leads from the first to the second
    for at in reversed(graph.order):
        for child in graph.children[at]:
            after[at] |= after[child]
            after[at, child] = True
    until = after.T | np.eye(count, dtype=bool)  # [operator, another]: when the second starts, the first has not ended
    waits = np.zeros(count, dtype=np.int64)  # by the operator that starts: what is there besides weights
    for at, one in enumerate(graph.operators):
        waits += after[at] * one.kept_bytes
    there = {at: after[at] & until[readers].any(0) for at, readers in stays}
    for at, mask in there.items():
        waits += mask * graph.operators[at].output_bytes
    fullest = int(waits.argmax())
    full = [sum(graph.operators[at].weight_bytes for at in members) for members in graph.groups]
    for at, one in enumerate(graph.operators):
        full[group[at]] += one.kept_bytes * bool(after[at, fullest])
        full[group[at]] += one.output_bytes * bool(at in there and there[at][fullest])
    return [end, full]
