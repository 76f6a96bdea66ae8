"""Favourites: which reader of an output should stay on its device, by Hanen and Munier's linear program."""

from collections.abc import Sequence
from itertools import pairwise

from tightfit.planner.placement.graph import chains
from tightfit.planner.placement.times import Times, times
from tightfit.terms.cluster import Cluster
from tightfit.terms.graph import Graph

_FAVOURITE_UPTO = 0.5  # of an edge's transfer (Baechi's PyTorch version); equal twins get one half each, and one of them is to stay
_SPARE = 1e-3  # weight of all transfers together beside the makespan: where that leaves a choice open, the dear transfer is saved
_LARGE_EDGES = 4000  # more than so many, and chains are one operator each in the program
_SECONDS = 30.0


def favourite_children(graph: Graph, cluster: Cluster) -> list[int]:
    """For each operator the reader that should stay on its device, or -1. None is the favourite of two.

    The relaxed program of small-communication-time scheduling (Hanen and Munier 1995; Baechi, SoCC 2020): with x of an edge the share of
    its transfer that is paid, at most one child per parent and one parent per child go without. Edges up to one half are taken by rising
    x, of equals the dearest transfer first, while both ends are still free; so no rounding breaks the rule.
    """
    if len(graph.edges) <= _LARGE_EDGES:
        return _rounded(graph, times(graph, cluster))
    small = chains(graph)
    found, favourites = [-1] * len(graph.operators), _rounded(small.graph, times(small.graph, cluster))
    for members, child in zip(small.members, favourites, strict=True):
        for at, following in pairwise(members):
            found[at] = following
        if child >= 0:
            found[members[-1]] = small.members[child][0]
    return found


def _rounded(graph: Graph, costs: Times) -> list[int]:
    edges = [(parent, child) for parent, children in enumerate(graph.children) for child in children]
    send, favourite, taken = costs.typical_send, [-1] * len(graph.operators), [False] * len(graph.operators)
    shares = relaxed(edges, costs.typical_run, send) if edges else []
    for share, _, parent, child in sorted((round(share, 6), -send[edge[0]], *edge) for share, edge in zip(shares, edges, strict=True)):
        if share <= _FAVOURITE_UPTO and favourite[parent] < 0 and not taken[child]:
            favourite[parent], taken[child] = child, True
    return favourite


def relaxed(edges: Sequence[tuple[int, int]], run: Sequence[float], send: Sequence[float]) -> Sequence[float]:
    """The program's x by edge, in [0, 1]: 0 where the child stays on its parent's device, 1 where the transfer is paid in full.

    Minimise the makespan w with s(i) + p(i) + c(i) x(ij) <= s(j), s(i) + p(i) <= w, and sums of x over the children of one parent, and
    over the parents of one child, of at least their number less one. Without an answer in time, all transfers are paid.
    """
    import numpy as np
    from scipy.optimize import linprog
    from scipy.sparse import coo_array, vstack

    count, ends = len(edges), np.array(edges)
    scale = max(sum(run), 1e-300)  # times as shares of all work: the solver's tolerances are absolute
    p, c = np.array(run) / scale, np.array(send)[ends[:, 0]] / scale
    number, width = np.arange(count), count + len(run) + 1  # columns: x by edge, s by operator, w

    def rows(height: int, *entries: tuple[np.ndarray, np.ndarray, np.ndarray | float]) -> coo_array:
        at = [np.concatenate([np.broadcast_to(entry[part], entry[0].shape) for entry in entries]) for part in range(3)]
        return coo_array((at[2], (at[0], at[1])), shape=(height, width))

    ones, all_run = np.ones(count), np.arange(len(run))
    after = rows(count, (number, number, c), (number, count + ends[:, 0], ones), (number, count + ends[:, 1], -ones))
    finish = rows(len(run), (all_run, count + all_run, 1.0), (all_run, np.full(len(run), width - 1), -1.0))
    degrees = [np.bincount(ends[:, side], minlength=len(run)) for side in (0, 1)]
    few = [rows(len(run), (ends[:, side], number, -ones)) for side in (0, 1)]
    found = linprog(
        np.concatenate([_SPARE * c / max(c.sum(), 1e-300), np.zeros(len(run)), [1.0]]),
        A_ub=vstack([after, finish, *few]).tocsr(),
        b_ub=np.concatenate([-p[ends[:, 0]], -p, *(np.minimum(1 - degree, 0) for degree in degrees)]),
        bounds=[(0, 1)] * count + [(0, None)] * (len(run) + 1),
        method="highs",
        options={"time_limit": _SECONDS},
    )
    return ones.tolist() if found.x is None else found.x[:count].tolist()
