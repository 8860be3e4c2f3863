"""One model through its life: loaded when it is wanted, with a worker behind it, and unloaded."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass, replace
from typing import Final, Protocol

from quire.engine.messages import LoadProgress, Ready
from quire.serve.backend import Unavailable
from quire.serve.errors import ApiError
from quire.serve.metrics import Metrics
from quire.serve.model_options import ModelOptions
from quire.serve.model_source import ModelSource, worker_config
from quire.serve.model_use import ModelUse
from quire.serve.process_memory import forget_unreachable
from quire.serve.registry import Served
from quire.serve.served_model import ModelFilesError
from quire.serve.settings import SettingsError
from quire.serve.supervisor import ModelChanged, StartupFailed, Supervisor
from quire.serve.worker_client import LOADING_RETRY_AFTER, WorkerClient

logger = logging.getLogger("quire.serve")

# A request for a model that is not in memory waits so long for its load.
MAX_WAIT: Final = 300.0  # seconds
# While a model is downloaded, which may take an hour, only a moment.
DOWNLOAD_WAIT: Final = 2.0  # seconds
# A load that has failed is not tried again for each request.
FAILURE_LASTS: Final = 10.0  # seconds
# Streams of a model that is gone have ended by then.
_FORGET_AFTER: Final = 0.5  # seconds
LOAD_ERRORS: Final = (ModelFilesError, SettingsError, StartupFailed)


@dataclass(frozen=True)
class WorkerEvents:
    """Who is told what a worker says and does."""

    on_output: Callable[[str], None]
    on_progress: Callable[[LoadProgress], None]
    on_ready: Callable[[Served, Ready], None]


class Fleet(Protocol):
    """The other models, as one of them sees them."""

    async def begin(self, slot: ModelSlot) -> None:
        """Make room for ``slot`` and start it. Raises :class:`Unavailable`."""
        ...

    def memory_fraction(self, slot: ModelSlot) -> float | None:
        """What the others leave of the memory; None: as the worker decides."""
        ...


class ModelSlot:
    """A model that is served, in memory or not. Implements ``registry.Entry``.

    When a worker dies and the files have changed since it was started, they are read again, so that
    weights, tokenizer and template always belong together.
    """

    def __init__(
        self,
        options: ModelOptions,
        command: Sequence[str],
        metrics: Metrics,
        events: WorkerEvents,
        fleet: Fleet,
    ) -> None:
        self.options = options
        self.id = options.name
        self.names = options.names
        self.created = int(time.time())
        self.served: Served | None = None
        self.info: Ready | None = None  # of the worker that was ready last, while it is loaded
        self.use = ModelUse(None if options.pinned else options.idle_ttl, self._leave_if_idle)
        self._command = command
        self._metrics = metrics.for_model(options.name)
        self._metrics.worker.eviction_policy = options.settings.eviction_policy
        self._metrics.worker.is_wanted = False
        self._events = events
        self._fleet = fleet
        self._supervisor: Supervisor | None = None
        self._source = ModelSource(options, self._metrics)
        self._residence: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._stopping = False
        self._failure: Exception | None = None
        self._failed_at = 0.0
        self._is_draining = False
        self._is_asked_for = False  # the load that has begun, by a request
        self._held_bytes = 0

    # ---- what the HTTP layer and the fleet ask

    @property
    def is_loaded(self) -> bool:
        """Whether it takes memory, or is about to."""
        return self._residence is not None

    @property
    def is_ready(self) -> bool:
        ready = self._ready
        return ready is not None and ready.done() and not self._stopping

    @property
    def is_leaving(self) -> bool:
        """Whether its worker has been told to end and still takes memory."""
        return self._residence is not None and self._stopping

    @property
    def may_go(self) -> bool:
        """Whether another model may take its place now."""
        return self.is_ready and not self.options.pinned and not self.use.num_leases

    @property
    def alive(self) -> bool:
        # A first worker that is about to be there is no reason to be restarted, nor is one that
        # leaves.
        is_meant_to_be = self.info is not None and not self._stopping
        return not is_meant_to_be or self.served is None or self.served.backend.alive

    def why_unavailable(self) -> Unavailable | None:
        if self._is_draining:
            return Unavailable("The server is shutting down.", LOADING_RETRY_AFTER)
        if self._stopping or (self._is_asked_for and not self.is_ready):
            return None  # who asks waits for the load
        if self.served is not None:
            return self.served.backend.why_unavailable()
        if self.is_loaded:
            return Unavailable(self._source.what_it_waits_for(), LOADING_RETRY_AFTER)
        return None

    async def open(self, name: str) -> Served:
        """As in ``registry.Entry``."""
        self.use.lease()
        starting = not self._is_asked_for and self.is_loaded and not self._stopping
        if starting and (reason := self.why_unavailable()) is not None:
            raise reason  # Nobody has asked for this load; who comes too early comes back.
        await self.load()
        assert self.served is not None
        return self._with_preset(self.served, name)

    async def load(self) -> None:
        """Return once it is ready. Raises :class:`Unavailable` and :class:`ApiError`."""
        if self.is_ready:
            return
        if self._is_draining:
            raise Unavailable("The server is shutting down.", LOADING_RETRY_AFTER)
        if self.is_leaving:
            await self.end()
        if not self.is_loaded:
            if self._failure is not None and time.monotonic() - self._failed_at < FAILURE_LASTS:
                raise self._as_api_error(self._failure)
            await self._fleet.begin(self)
        ready = self._ready
        assert ready is not None
        await asyncio.wait({ready}, timeout=DOWNLOAD_WAIT)
        if self._source.path is not None:
            await asyncio.wait({ready}, timeout=MAX_WAIT)
        if not ready.done() or ready.cancelled():
            raise Unavailable(self._source.what_it_waits_for(), LOADING_RETRY_AFTER)
        if (error := ready.exception()) is not None:
            raise self._as_api_error(error)

    async def unload(self) -> None:
        """As in ``registry.Entry``; a model that is not loaded stays as it is."""
        if self.use.num_leases:
            raise ApiError(
                409, f"{self.use.num_leases} requests are using {self.id}.", code="model_in_use"
            )
        await self.end()

    # ---- its life

    def start(self, *, is_asked_for: bool) -> None:
        """Begin to load, for a request or because it is wanted from the start."""
        assert self._residence is None
        self._is_asked_for = is_asked_for
        self._stopping = False
        self._failure = None
        self._metrics.worker.is_wanted = True
        self._ready = asyncio.get_running_loop().create_future()
        self._ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())
        # Nothing of the request that asks for it lives as long as the model does.
        self._residence = asyncio.create_task(self._reside(), context=Context())
        self._residence.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def end(self) -> None:
        """Have the worker leave, and return when it has."""
        residence = self._residence
        if residence is not None:
            if not self._stopping:
                logger.info("unloading %s", self.id)
                self.stop()
            await asyncio.wait({residence})

    async def drain(self, grace: float) -> None:
        """See :meth:`Supervisor.drain`."""
        self._is_draining = True
        if self._supervisor is not None:
            await self._supervisor.drain(grace)

    def stop(self) -> None:
        self._stopping = True
        if self._supervisor is not None:
            self._supervisor.stop()
        elif self._residence is not None:
            self._residence.cancel()

    def kill(self) -> None:
        self.stop()
        if self._supervisor is not None:
            self._supervisor.kill()

    async def _reside(self) -> None:
        try:
            await self._serve()
        except Exception as error:
            self._failure, self._failed_at = error, time.monotonic()
            if not isinstance(error, LOAD_ERRORS):
                logger.exception("%s has failed", self.id)
            elif self._is_asked_for or self._ready is None or self._ready.done():
                logger.error("%s could not be loaded: %s", self.id, error)
            assert self._ready is not None
            if not self._ready.done():
                self._ready.set_exception(error)
        finally:
            self.served = self.info = self._supervisor = self._residence = None
            if self._ready is not None and not self._ready.done():
                self._ready.cancel()
            self._ready = None
            self._metrics.worker.is_wanted = False
            # Once this task refers to nothing of the model any more.
            asyncio.get_running_loop().call_later(_FORGET_AFTER, forget_unreachable)

    async def _serve(self) -> None:
        """Raises one of :data:`LOAD_ERRORS`."""
        source = self._source
        await source.find()
        self.served = await source.read()
        while not self._stopping:
            self._supervisor = self._supervise(self.served)
            try:
                async with self.served.model.helpers():
                    await self._supervisor.run()
                return
            except ModelChanged:
                logger.warning("The files in %s have changed: reading them again.", source.folder)
            self._supervisor = None  # so that stopping ends the wait
            self.served = await source.read_when_sound()

    async def first_load(self) -> None:
        """Return once it is ready. Raises what the load that has begun raises."""
        assert self._ready is not None
        await asyncio.shield(self._ready)

    @property
    def held_bytes(self) -> int:
        """What it takes, or is going to take; of a model never loaded what its files tell."""
        if (info := self.info) is not None:
            limits = info.limits
            rest = limits.activations + limits.cache if limits else 0
            self._held_bytes = info.weight_bytes + info.kv_cache_bytes + rest
        return self._held_bytes or self._source.weight_bytes

    def _supervise(self, served: Served) -> Supervisor:
        assert isinstance(served.backend, WorkerClient)
        source = self._source

        def on_ready(info: Ready) -> None:
            self.info = info
            if self._ready is not None and not self._ready.done():
                self._ready.set_result(None)
                self.use.touch()
            self._events.on_ready(served, info)

        settings = self.options.settings
        fraction = self._fleet.memory_fraction(self)
        return Supervisor(
            served.backend,
            worker_config(replace(settings, memory_fraction=fraction), source.folder, served.model),
            self._command,
            on_output=self._events.on_output,
            on_progress=self._events.on_progress,
            on_ready=on_ready,
            is_changed=lambda: source.is_changed,
            step_timeout=settings.step_timeout,
        )

    def _leave_if_idle(self) -> None:
        if self.may_go:
            logger.info("%s has not been used for %g s", self.id, self.options.idle_ttl)
            self.stop()

    # ---- words

    def _as_api_error(self, error: BaseException) -> ApiError:
        left = math.ceil(max(1.0, FAILURE_LASTS - (time.monotonic() - self._failed_at)))
        return ApiError(
            503,
            f"The model {self.id} could not be loaded: {error}",
            code="model_not_loaded",
            headers={"Retry-After": str(left)},
        )

    def _with_preset(self, served: Served, name: str) -> Served:
        _, _, preset = name.rpartition(":")
        sampling = self.options.presets.get(preset) if name not in self._plain_names else None
        if sampling is None:
            return served
        default = sampling.over(served.model.default_sampling)
        return replace(served, model=replace(served.model, default_sampling=default))

    @property
    def _plain_names(self) -> Sequence[str]:
        return (self.id, *self.options.aliases)
