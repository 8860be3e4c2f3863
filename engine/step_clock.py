"""Where the time of steps goes: to schedule, to build, to wait, to hand out tokens."""

from __future__ import annotations

import time

from quire.cache.tally import Tally
from quire.engine.messages import STEP_SECONDS_BOUNDS, STEP_TOKENS_BOUNDS, Histogram, StepStats


class StepClock:
    """Each ``end_*`` takes the time since the one before it."""

    def __init__(self) -> None:
        self._schedule = self._build = self._wait = self._emit = 0.0
        self._began = self._marked = 0.0
        self._seconds = Tally(STEP_SECONDS_BOUNDS)
        self._tokens = Tally(STEP_TOKENS_BOUNDS)

    def begin(self) -> None:
        self._began = self._marked = time.perf_counter()

    def end_schedule(self) -> None:
        self._schedule += self._lap()

    def end_build(self) -> None:
        self._build += self._lap()

    def end_wait(self) -> None:
        self._wait += self._lap()

    def end_emit(self, num_tokens: int | None) -> None:
        """``num_tokens`` of the step that has retired; None if there was none."""
        self._emit += self._lap()
        if num_tokens is not None:
            self._seconds.add(self._marked - self._began)
            self._tokens.add(num_tokens)

    def stats(self) -> StepStats:
        return StepStats(
            schedule_seconds=self._schedule,
            build_seconds=self._build,
            wait_seconds=self._wait,
            emit_seconds=self._emit,
            seconds=Histogram(list(self._seconds.counts), self._seconds.total),
            tokens=Histogram(list(self._tokens.counts), self._tokens.total),
        )

    def _lap(self) -> float:
        now = time.perf_counter()
        lap, self._marked = now - self._marked, now
        return lap
