"""A worker reads and writes no memory beyond the embedding table and the logits."""

from __future__ import annotations

from typing import Any

import pytest

from quire.engine.messages import GenerateRequest, SamplingParams, ThinkingBudget
from quire.engine.worker import _all_below, _token_ids


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


@pytest.mark.parametrize(
    "fields",
    [
        {"stop_token_ids": [300]},
        {"sampling": SamplingParams(logit_bias={300: 1.0})},
        {"sampling": SamplingParams(allowed_token_ids=[1, 300])},
        {"sampling": SamplingParams(bad_words=[[1], [2, 300]])},
        {"thinking": ThinkingBudget(1, [300])},
        {"thinking": ThinkingBudget(1, [1], then_token_ids=[300])},
        {"thinking": ThinkingBudget(1, [1], open_token_ids=[300])},
    ],
    ids=str,
)
def test_so_are_those_that_are_not_of_the_prompt(fields: dict[str, Any]) -> None:
    request = GenerateRequest(0, [1], 1, **{"sampling": SamplingParams(), **fields})
    assert not all(_all_below(300, ids) for ids in _token_ids(request))
    assert all(_all_below(301, ids) for ids in _token_ids(request))
