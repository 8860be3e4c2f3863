"""Counts by size agree with counting by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quire.cache.tally import Tally

BOUNDS = (0.1, 1.0, 10.0)


@given(st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.11, 1.0, 5.0, 10.0, 11.0, 1e9])))
def test_each_value_is_counted_below_the_first_bound_that_holds_it(values):
    tally = Tally(BOUNDS)
    for value in values:
        tally.add(value)
    below = [sum(value <= bound for value in values) for bound in BOUNDS]
    for place, expected in enumerate(below):
        assert sum(tally.counts[: place + 1]) == expected
    assert sum(tally.counts) == len(values)
    assert tally.total == sum(values)
