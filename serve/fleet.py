"""All models of a server: which of them are in memory, and who leaves to make room."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence

from quire.engine.memory.budget import DEFAULT_FRACTION, working_set
from quire.engine.memory.host import total_memory
from quire.serve.backend import Unavailable
from quire.serve.metrics import Metrics
from quire.serve.model_options import all_options
from quire.serve.model_slot import ModelSlot, WorkerEvents
from quire.serve.settings import ServeSettings

logger = logging.getLogger("quire.serve")

_RETRY_AFTER = 5  # seconds
_LEAST_FRACTION = 0.02  # enough for a worker to find out that it is too little


class Fleet:
    """The models, each in a slot of its own. Implements ``model_slot.Fleet``.

    One that is asked for is loaded. Where the memory, or the number of models, does not allow that,
    those that nobody uses leave first, the one that was used longest ago before the others.
    """

    def __init__(
        self,
        settings: ServeSettings,
        command: Sequence[str],
        metrics: Metrics,
        events: WorkerEvents,
    ) -> None:
        """Raises :class:`SettingsError`."""
        self._settings = settings
        self._deciding = asyncio.Lock()
        self._stopping = asyncio.Event()
        self.slots = [
            ModelSlot(options, command, metrics, events, self) for options in all_options(settings)
        ]

    async def run(self) -> None:
        """Serve until :meth:`stop`.

        Raises :class:`ModelFilesError`, :class:`SettingsError` or :class:`StartupFailed` where a
        model that is wanted from the start cannot be loaded.
        """
        wanted = [slot for slot in self.slots if slot.options.at_start]
        for slot in wanted:
            slot.start(is_asked_for=False)
        loading = [asyncio.create_task(slot.first_load()) for slot in wanted]
        stopping = asyncio.create_task(self._stopping.wait())
        pending: set[asyncio.Task[object]] = {*loading, stopping}
        try:
            while not stopping.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if not task.cancelled() and (error := task.exception()) is not None:
                        raise error
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            await asyncio.gather(*(slot.end() for slot in self.slots))

    async def drain(self, grace: float) -> None:
        """Refuse new requests and give the running ones ``grace`` seconds to finish."""
        await asyncio.gather(*(slot.drain(grace) for slot in self.slots))

    def stop(self) -> None:
        """Let the workers leave and :meth:`run` return."""
        self._stopping.set()

    def kill(self) -> None:
        """Like :meth:`stop`, but the workers get no time."""
        self._stopping.set()
        for slot in self.slots:
            slot.kill()

    # ---- who is in memory

    async def begin(self, slot: ModelSlot) -> None:
        async with self._deciding:
            if slot.is_loaded:
                return
            await self._wait_for_leaving()
            while (lack := self._lack(slot)) is not None:
                going = [other for other in self.slots if other.may_go]
                if not going:
                    raise Unavailable(f"There is no room for {slot.id} now: {lack}", _RETRY_AFTER)
                await min(going, key=lambda other: other.use.last_used).end()
                await self._wait_for_leaving()
            slot.start(is_asked_for=True)

    async def _wait_for_leaving(self) -> None:
        """What they hold is not counted against the model that comes."""
        while leaving := [slot for slot in self.slots if slot.is_leaving]:
            await leaving[0].end()

    def memory_fraction(self, slot: ModelSlot) -> float | None:
        own = slot.options.settings.memory_fraction
        others = [other for other in self.slots if other.is_loaded and other is not slot]
        if not others or any(o.info is not None and o.info.device == "cuda" for o in others):
            return own  # a worker sees what of an NVIDIA GPU is free
        taken = sum(other.held_bytes for other in others) / self._memory()
        return max(_LEAST_FRACTION, (own or DEFAULT_FRACTION) - taken)

    def _lack(self, slot: ModelSlot) -> str | None:
        """Why ``slot`` cannot be loaded beside those that are; None where it can."""
        loaded = [other for other in self.slots if other.is_loaded]
        limit = self._settings.max_loaded_models
        if limit is not None and len(loaded) >= limit:
            return f"{len(loaded)} models are in use, as many as may be loaded."
        fraction = self._settings.memory_fraction or DEFAULT_FRACTION
        held = sum(other.held_bytes for other in loaded)
        if loaded and held + slot.held_bytes > fraction * self._memory():
            return "other models that are in use take the memory."
        return None

    def _memory(self) -> int:
        """Bytes that models may share, as a worker has reported them, or of this machine."""
        for slot in self.slots:
            if slot.info is not None and slot.info.limits is not None:
                return slot.info.limits.usable
        return working_set(total_memory(), "metal" if sys.platform == "darwin" else "cpu")
