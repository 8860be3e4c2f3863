"""A limit on how often something may happen, which allows bursts."""

from __future__ import annotations

import time


class TokenBucket:
    """``rate`` a second on average, at most ``burst`` at once; starts full."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._updated = time.monotonic()

    def take(self) -> float:
        """Take one: 0, or the seconds until there is one again, and then nothing is taken."""
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._updated) * self._rate)
        self._updated = now
        if self._left >= 1:
            self._left -= 1
            return 0.0
        return (1 - self._left) / self._rate
