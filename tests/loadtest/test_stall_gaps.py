from __future__ import annotations

import pytest

from quire.loadtest.stall import gaps_between


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 100, [10, 5, 40]),
        (12, 14, [5]),  # inside one gap: the whole gap counts
        (14, 20, [5, 40]),  # open at the end: counted whole as well
        (15, 20, [40]),
        (0, 10, [10]),  # a gap that begins at the end is later
        (60, 70, []),
    ],
)
def test_gaps_that_overlap_an_interval(start: float, end: float, expected: list[float]) -> None:
    assert gaps_between([0, 10, 15, 55], start, end) == expected
