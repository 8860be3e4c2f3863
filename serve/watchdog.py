"""Notices a worker that lives but does nothing: stopped, or in a step that never ends.

While there is work, the worker's life line (:mod:`quire.engine.life_line`) is asked every
:data:`TICK` seconds. Questions without an answer are counted rather than timed, so that a front end
that was stopped itself, or a machine that slept, does not take that for the worker's silence.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import Final

TICK: Final = 2.0  # seconds
MAX_UNANSWERED: Final = 6  # questions: a stopped worker is found within 14 s
# To load libraries from a cold disk holds up all threads.
MAX_UNANSWERED_LOADING: Final = 60
# A step takes as long as its tokens need, and kernels may be compiled in it. Of what the warm-up
# took, which runs the largest steps and the first of each kind, no step takes many times as much.
LEAST_STEP_LIMIT: Final = 120.0  # seconds
WARM_UPS: Final = 30


def step_limit(warm_up_seconds: float) -> float:
    """Seconds after which a step is taken to be endless."""
    return max(LEAST_STEP_LIMIT, WARM_UPS * warm_up_seconds)


class AnswerPipe:
    """What the worker inherits ``for_worker`` of, and the front end reads."""

    def __init__(self) -> None:
        self._reader, self.for_worker = os.pipe()
        os.set_blocking(self._reader, False)

    def spawned(self) -> None:
        """The worker has its own copy of the descriptor."""
        if self.for_worker >= 0:
            os.close(self.for_worker)
            self.for_worker = -1

    def read(self) -> float | None:
        """The latest answer, in seconds of the current step; None if none has come since."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            while more := os.read(self._reader, 4096):
                data += more
        lines = data.split()
        return float(lines[-1]) if lines else None

    def close(self) -> None:
        self.spawned()
        os.close(self._reader)


async def until_hung(
    ask: Callable[[], None],
    answers: AnswerPipe,
    work: Callable[[], Awaitable[None]],
    limit: Callable[[], float | None],
) -> str:
    """Returns once the worker hangs, with a sentence that says how.

    Args:
        ask: writes a byte to the worker's life line.
        work: returns when there is some; while the worker loads, at once.
        limit: seconds of a step; None while the worker loads.
    """
    unanswered = 0
    while True:
        await work()
        ask()
        await asyncio.sleep(TICK)
        step_seconds = answers.read()
        seconds = limit()
        if step_seconds is None:
            unanswered += 1
            if unanswered >= (MAX_UNANSWERED if seconds else MAX_UNANSWERED_LOADING):
                return f"The worker has not answered for {unanswered * TICK:g} s."
            continue
        unanswered = 0
        if seconds is not None and step_seconds > seconds:
            return f"A step of the worker has not ended after {step_seconds:.0f} s."
