"""Where the time of a worker's start goes."""

from __future__ import annotations

import time
from typing import Final

_FIRST: Final = "starting"  # until the worker tells of a stage: Python and its imports


class LoadClock:
    """The stages of one start, in seconds."""

    def __init__(self) -> None:
        self._began = self._entered = time.monotonic()
        self._stage = _FIRST
        self._stages: dict[str, float] = {}

    def enter(self, stage: str) -> None:
        """The worker is in ``stage`` now; it may be told so more than once."""
        if stage != self._stage:
            self._end_stage()
            self._stage = stage

    def stop(self) -> None:
        """The worker is ready."""
        self._end_stage()

    @property
    def total(self) -> float:
        return self._entered - self._began

    @property
    def last_stage(self) -> float:
        """Of a start that has ended: how long its last stage took."""
        return self._stages[self._stage]

    def __str__(self) -> str:
        """ "8.1 s: starting 1.7, loading weights 0.6, warming up 5.8"."""
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self._stages.items())
        return f"{self.total:.1f} s: {stages}"

    def _end_stage(self) -> None:
        now = time.monotonic()
        self._stages[self._stage] = self._stages.get(self._stage, 0.0) + now - self._entered
        self._entered = now
