"""Functions compiled for what recurs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import mlx.core as mx

DIRECT_RUNS = 6  # of a step before its form is worth a graph of its own
_MAX_FORMS = 256  # before all graphs are dropped


class Recurring:
    """A function of arrays that is compiled for forms that come more than a few times.

    To trace a whole step and simplify its graph takes several times as long as to build it once.
    When requests come and go, many forms never come again.
    """

    def __init__(self, function: Callable[..., mx.array], direct_runs: int = DIRECT_RUNS) -> None:
        """``direct_runs``: how often a form is run without a graph of its own."""
        self._function = function
        self._compiled: Callable[..., Any] = mx.compile(function)
        self._direct_runs = direct_runs
        self._runs: Counter[Hashable] = Counter()

    def __call__(self, form: Hashable, *args: Any) -> mx.array:
        """``form``: all about ``args`` that makes another graph of them."""
        runs = self._runs[form]
        if runs < self._direct_runs:
            if not runs and len(self._runs) > _MAX_FORMS:
                self._runs.clear()
                self._compiled = mx.compile(self._function)
            self._runs[form] += 1
            return self._function(*args)
        result: mx.array = self._compiled(*args)
        return result
