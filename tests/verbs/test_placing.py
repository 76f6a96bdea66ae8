"""Verbs of placing, called from Python."""

import pytest

from tightfit.data.graphs import GraphFile
from tightfit.terms.errors import TightfitError
from tightfit.terms.graph import Graph, Operator
from tightfit.verbs.placing import place, read_cluster

SOURCE = GraphFile(Graph("g", (Operator("a", 1.0, 10), Operator("b", 2.0, 10)), ()), ("a", "b"))


@pytest.mark.parametrize(("objective", "seconds"), [("makespan", 2.0), ("throughput", 2.0)])
def test_an_objective_is_what_is_answered(objective: str, seconds: float) -> None:
    report = place(SOURCE, read_cluster("2x100B"), objective, 0)
    assert (report.placed.objective, report.placed.seconds) == (objective, seconds)


@pytest.mark.parametrize("objective", ["speed", "makespam", "", "Throughput"])
def test_no_other_objective_is_taken_for_one(objective: str) -> None:
    with pytest.raises(TightfitError, match=f"no objective is called `{objective}`") as caught:
        place(SOURCE, read_cluster("2x100B"), objective, 0)
    assert "throughput" in caught.value.hint or "makespan" in caught.value.hint
