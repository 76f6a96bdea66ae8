"""Placement: which device runs which operator of a step, so that it ends early and no device's memory overflows (Baechi, SoCC 2020)."""
