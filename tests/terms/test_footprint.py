"""Footprint: sums by kind, the phase that holds the peak, and how phases are extended."""

from tightfit.terms.footprint import Footprint, combine, total


def test_combine_adds_factors_name_by_name():
    base, deeper = {"weights": 100, "activations": 7}, {"weights": 150, "activations": 7, "kv_cache": 3}
    assert combine([(1, base), (30, deeper), (-30, base)]) == {"weights": 100 + 30 * 50, "activations": 7, "kv_cache": 90}
    assert combine([]) == {}


def test_the_peak_is_one_phase_and_not_the_sum_of_highest_kinds():
    footprint = Footprint({"forward": {"weights": 10, "activations": 50}, "optimizer": {"weights": 10, "optimizer": 45}})
    assert footprint.peak_phase == "forward"
    assert footprint.peak == {"weights": 10, "activations": 50}
    assert footprint.peak_bytes == total(footprint.peak) == 60


def test_work_of_a_stem():
    work = {"prefill: blocks": {"flops": 8.0}, "decode": {"flops": 1.0}, "decode: blocks": {"flops": 2.0, "operations": 5}}
    footprint = Footprint({"decode": {}}, work)
    assert footprint.work_of("decode") == {"flops": 3.0, "operations": 5}
    assert footprint.work_of("") == {"flops": 11.0, "operations": 5}
    assert footprint.work_of("encoder") == {}
