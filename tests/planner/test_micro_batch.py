"""The planner splits a batch that does not fit at once, keeps the effective batch, and never splits one that does."""

import pytest
from planning import MACHINE, LowRank, planned

from tightfit.terms.errors import DoesNotFit
from tightfit.terms.footprint import total
from tightfit.terms.workload import Workload

BATCH = Workload("tune", 8, 64)
NAMES = ["recompute", "offload"]


def tuned(ram, workload=BATCH, names=NAMES):
    return planned(workload, ram, disk=0, names=names, asked={"low_rank": {}}, more={"low_rank": LowRank})


def needed(workload, names=()):
    return total(tuned(1 << 40, workload, list(names)).predicted["ram"])


def test_a_batch_that_fits_stays_whole():
    plan = tuned(1 << 40)
    assert plan.workload == BATCH
    assert plan.workload.passes == 1


@pytest.mark.parametrize("rows", [4, 2, 1])
def test_a_batch_is_split_into_the_most_that_fits(rows):
    """Without recomputation, so that only splitting helps. The budget is what so many rows take, and a little."""
    plan = tuned(int(needed(Workload("tune", 8, 64, micro_batch=rows)) * 1.01), names=[])
    assert (plan.workload.batch, plan.workload.rows, plan.workload.passes) == (8, rows, 8 // rows)


def test_splitting_is_chosen_over_recomputing_where_it_is_faster():
    whole, halved = needed(BATCH), needed(Workload("tune", 8, 64, micro_batch=4))
    assert halved < whole
    plan = tuned((whole + halved) // 2)
    assert plan.workload.rows == 4
    assert "recompute" not in plan.techniques


def test_a_micro_batch_that_was_asked_for_is_kept():
    asked = Workload("tune", 8, 64, micro_batch=2)
    assert tuned(1 << 40, asked).workload == asked
    with pytest.raises(DoesNotFit):
        tuned(needed(asked) // 2, asked)


def test_a_step_of_two_passes_takes_twice_the_time_of_one():
    half, whole = tuned(1 << 40, Workload("tune", 4, 64)), tuned(1 << 40, Workload("tune", 8, 64, micro_batch=4))
    assert whole.seconds["step"] == pytest.approx(2 * half.seconds["step"], rel=0.05)


def test_a_refusal_speaks_of_the_smallest_split():
    """With one row at a time a smaller batch would not help any more."""
    with pytest.raises(DoesNotFit) as error:
        tuned(MACHINE.overhead_ram + 200_000)
    assert "`--batch`" not in error.value.hint


def test_other_work_is_never_split():
    assert planned(Workload("embed", 8, 64)).workload == Workload("embed", 8, 64)
