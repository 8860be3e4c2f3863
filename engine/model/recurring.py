"""Functions compiled for what recurs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import mlx.core as mx

Result = TypeVar("Result")

# Runs of a form before it is compiled: to trace a step of an 8B model took 30 ms on an H100's host,
# to build it directly 2 ms.
DIRECT_RUNS = 15
_COMPILED = -1
_MAX_FORMS = 512  # the one that was used longest ago is dropped


class Recurring(Generic[Result]):
    """A function of a form and arrays that is compiled for forms that come more than a few times.

    To trace a whole step and simplify its graph takes several times as long as to build it once,
    and when requests come and go some forms never come again.
    """

    def __init__(self, function: Callable[..., Result], direct_runs: int = DIRECT_RUNS) -> None:
        """
        Args:
            function: takes the form and then arrays; all that makes another graph of them is in
                the form, or is their shapes and types.
            direct_runs: how often a form is run without a graph of its own.
        """
        self._function = function
        self._direct_runs = direct_runs
        self._forms: dict[Hashable, tuple[int, Callable[..., Result]]] = {}
        self._at_once = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Context manager: within it, forms are compiled when they come for the first time."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def __call__(self, form: Hashable, *args: Any) -> Result:
        runs, function = self._forms.pop(form, (0, partial(self._function, form)))
        if runs != _COMPILED and (self._at_once or runs >= self._direct_runs):
            runs, function = _COMPILED, mx.compile(function)
        if len(self._forms) == _MAX_FORMS:
            del self._forms[next(iter(self._forms))]
        # The newest comes last.
        self._forms[form] = (runs if runs == _COMPILED else runs + 1), function
        return function(*args)
