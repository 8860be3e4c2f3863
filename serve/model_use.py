"""Which requests need a model, and how long none has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from quire.serve import request_record


class ModelUse:
    def __init__(self, idle_ttl: float | None, on_idle: Callable[[], None]) -> None:
        """``on_idle`` is called once no request has needed it for ``idle_ttl`` seconds, if ever."""
        self.num_leases = 0  # requests that need the model
        self.last_used = 0.0  # on the monotonic clock
        self._idle_ttl = idle_ttl
        self._on_idle = on_idle
        self._timer: asyncio.TimerHandle | None = None

    def lease(self) -> None:
        """Keep the model while the current request lasts."""
        if (record := request_record.current()) is not None:
            self.num_leases += 1
            record.at_end.append(self._release)

    def touch(self) -> None:
        """It was used just now; the time until it is idle begins anew."""
        self.last_used = time.monotonic()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._idle_ttl is not None and not self.num_leases:
            self._timer = asyncio.get_running_loop().call_later(self._idle_ttl, self._elapsed)

    def _release(self) -> None:
        self.num_leases -= 1
        self.touch()

    def _elapsed(self) -> None:
        self._timer = None
        self._on_idle()
