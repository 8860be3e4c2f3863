"""The worker's end of standard input: it closes with the front end, and carries its questions.

A byte there asks whether the worker lives. The answer, on a pipe of its own, is a line with the
seconds that the current step has taken, "0" between two steps. It comes from a thread that does
nothing else: a process that is stopped does not answer, one whose step never ends tells how long.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time


class LifeLine:
    """``answers`` is the descriptor to answer on; -1 answers nothing."""

    def __init__(self, answers: int) -> None:
        self._answers = answers
        self._step_began: float | None = None

    def start(self) -> None:
        threading.Thread(target=self._run, name="life-line", daemon=True).start()

    def begin_step(self) -> None:
        self._step_began = time.monotonic()

    def end_step(self) -> None:
        self._step_began = None

    def _run(self) -> None:
        """Exit at once when standard input closes, whatever MLX is doing."""
        # A front end that ends may have asked just before, and does not read the answer.
        with contextlib.suppress(BrokenPipeError):
            while os.read(0, 4096):
                began = self._step_began
                seconds = 0.0 if began is None else time.monotonic() - began
                if self._answers >= 0:
                    os.write(self._answers, b"%.3f\n" % seconds)
        os._exit(0)
