"""Functions that are compiled once they have come often enough."""

from __future__ import annotations

import mlx.core as mx
import pytest

from quire.engine.model import recurring
from quire.engine.model.recurring import Recurring


class Runs:
    """Counts how often Python runs: a compiled function runs when it is traced only."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, power: int, x: mx.array) -> mx.array:
        self.count += 1
        return x**power


def test_a_form_is_traced_when_it_has_come_often_enough() -> None:
    runs = Runs()
    function = Recurring(runs, direct_runs=3)
    for k in range(10):
        assert function(2, mx.array([k])).tolist() == [k * k]
    assert runs.count == 4
    # Another form has a count of its own.
    assert function(3, mx.array([5])).tolist() == [125]
    assert runs.count == 5


def test_of_too_many_forms_the_one_used_longest_ago_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recurring, "_MAX_FORMS", 4)
    runs = Runs()
    function = Recurring(runs, direct_runs=0)
    for power in (1, 2, 3, 4, 1, 5, 1, 6):
        assert function(power, mx.array([2])).tolist() == [2**power]
    assert runs.count == 6
    function(1, mx.array([2]))
    assert runs.count == 6, "a form in use was dropped"
    function(2, mx.array([2]))
    assert runs.count == 7
