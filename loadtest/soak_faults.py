"""What a soak does to a server beside its load: swaps of models, changed files, killed workers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

from quire.loadtest.http import BaseURL, send
from quire.loadtest.soak_samples import family
from quire.loadtest.soak_traffic import Traffic

ADMIN_KEY: Final = "sk-soak"
_SWAPS: Final = (0.4, 1.6)  # from one to the next, of the mean
# Loaded, unloaded, in use just now, not to be loaded now.
_ADMIN_ANSWERS: Final = (200, 409, 500, 503)


class Pace(NamedTuple):
    """Seconds from one to the next."""

    kills: float
    swaps: float  # on average


class Faults:
    """Runs until it is cancelled; ``done`` counts what was done.

    ``folders`` are the models by name, ``pid`` is the front end's.
    """

    def __init__(
        self, traffic: Traffic, base: BaseURL, pid: int, folders: dict[str, Path], pace: Pace
    ) -> None:
        self.done: Counter[str] = Counter()
        self._traffic = traffic
        self._base = base
        self._pid = pid
        self._folders = folders
        self._pace = pace
        self._draw = Random(0)

    async def run(self) -> None:
        """Raises RuntimeError for an answer to the administrator that must not be."""
        next_kill = time.monotonic() + self._pace.kills
        while True:
            pause = self._pace.swaps * self._draw.uniform(*_SWAPS)
            next_swap = time.monotonic() + pause
            if next_kill < next_swap:
                await asyncio.sleep(max(0.0, next_kill - time.monotonic()))
                self._kill()
                next_kill += self._pace.kills
            await asyncio.sleep(max(0.0, next_swap - time.monotonic()))
            await self._swap()

    async def _swap(self) -> None:
        """All new requests are for the next model; now and then the administrator helps."""
        names = list(self._folders)
        old = self._traffic.model
        new = names[(names.index(old) + 1) % len(names)]
        self._traffic.model = new
        self.done["swaps"] += 1
        if self._draw.random() < 0.5:
            await self._administer("unload", old)
        if self._draw.random() < 0.5:
            await self._administer("load", new)

    async def _administer(self, verb: str, model: str) -> None:
        self.done[f"{verb}s"] += 1
        path, body = f"/v1/models/{verb}", json.dumps({"model": model}).encode()
        async with send(self._base, "POST", path, body, self._traffic.headers) as response:
            text = await response.read()
        self._traffic.tally.responses[f"POST {path} {response.status}"] += 1
        if response.status not in _ADMIN_ANSWERS:
            raise RuntimeError(f"{path}: status {response.status}: {text[:200]!r}")

    def _kill(self) -> None:
        """Every other time the files of the model have changed meanwhile, and are read again."""
        if self.done["kills"] % 2:
            for folder in self._folders.values():
                os.utime(folder / "config.json")
            self.done["changes of files"] += 1
        workers = [pid for pid, role in family(self._pid).items() if role == "worker"]
        if workers:
            with suppress(ProcessLookupError):
                os.kill(self._draw.choice(workers), signal.SIGKILL)
                self.done["kills"] += 1
