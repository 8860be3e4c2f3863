"""A worker reads no memory beyond the embedding table."""

from __future__ import annotations

import pytest

from quire.engine.worker import _all_below


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        ([], True),
        ([0, 299, 7], True),
        ([0, 300], False),
        ([-1], False),
        ([2**32], False),
        ([2**40, 1], False),
    ],
)
def test_ids_that_the_model_has_not_are_told(token_ids: list[int], expected: bool) -> None:
    assert _all_below(300, token_ids) is expected
