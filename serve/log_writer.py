"""Lines of the log to a file descriptor, by a thread that alone waits for whoever reads them.

A reader that ends, a disk that is full or a pipe that nobody empties costs lines, which are
counted, and never a worker, a request or a turn of the event loop.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections import deque
from typing import Final

MAX_WAITING: Final = 10_000  # lines
_GATHER: Final = 0.02  # seconds in which further lines join the first: each wake-up of the thread
# costs the event loop more than a line.
_MAX_LINE: Final = 16 * 1024  # bytes


class LogWriter:
    """Takes lines from any thread. They are written in order, each in one piece."""

    def __init__(self, descriptor: int = 2, max_waiting: int = MAX_WAITING) -> None:
        self.descriptor = descriptor
        self.dropped = 0  # lines, so far
        self._max_waiting = max_waiting
        self._lines: deque[bytes] = deque()
        self._unreported = 0  # of the dropped ones
        self._in_line = False  # whether a write has failed in the middle of one
        self._flushing = 0  # callers
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def write(self, line: str) -> None:
        """Write ``line``, which has no end of its own, some time soon."""
        data = line.encode(errors="backslashreplace")[:_MAX_LINE] + b"\n"
        with self._changed:
            if len(self._lines) >= self._max_waiting:
                self._drop()
            else:
                self._lines.append(data)
                if len(self._lines) == 1:
                    self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait until everything is written, or for ``seconds``; returns which of the two it was."""
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: not self._lines, seconds)
            finally:
                self._flushing -= 1

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                self._changed.wait_for(lambda: self._flushing, _GATHER)
            while self._lines:
                self._write_first()
            with self._changed:
                self._changed.notify_all()

    def _write_first(self) -> None:
        line, unreported = self._lines[0], self._unreported
        reported = unreported and self._is_written(b"%d lines of this log were lost\n" % unreported)
        written = self._is_written(line)
        with self._changed:
            if reported:
                self._unreported -= unreported
            if not written:
                self._drop()
            self._lines.popleft()  # only now, so that flush() waits for it

    def _drop(self) -> None:
        self.dropped += 1
        self._unreported += 1

    def _is_written(self, data: bytes) -> bool:
        """Whether all of ``data`` could be written; waits while there is hope."""
        left = b"\n" + data if self._in_line else data
        self._in_line = False
        whole = len(left)
        while left:
            try:
                left = left[os.write(self.descriptor, left) :]
            except BlockingIOError:  # shared with a program that made it non-blocking
                select.select([], [self.descriptor], [], 1.0)
            except OSError:
                self._in_line = 0 < len(left) < whole
                return False
        return True


def discard_output() -> None:
    """Forget what standard output could not take, which Python would try again as it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
