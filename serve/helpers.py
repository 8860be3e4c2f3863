"""Helper processes for work that cannot be trusted to end: a fixed few, each killed and replaced
when a job takes too long, takes too much memory or crashes.

A thread will not do: nothing ends a thread that loops, and what it holds of the interpreter's lock
or of the machine's memory is everybody's loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quire.serve.helper_client import Helper
from quire.serve.helper_errors import HelperBusy, HelperCrashed, HelperError, HelperFailed
from quire.serve.helper_process import Setup, pack_request

logger = logging.getLogger("quire.helpers")


@dataclass(frozen=True, slots=True)
class HelperLimits:
    processes: int = 2
    waiting: int = 256  # jobs; one more is refused at once
    seconds: float = 2.0  # of wall time for one job
    memory: int = 512 << 20  # bytes of one job, beside what an idle helper holds
    eager: bool = True  # started before there is work; else with the first job
    # Bytes: of several processes the last takes no larger jobs, for which small ones would wait.
    reserved: int | None = None
    # The kernel holds a process to its address space on Linux only; elsewhere, and besides, the
    # front end looks at resident memory.
    limit_address_space: bool = sys.platform == "linux"


@dataclass(slots=True)
class _Job:
    request: Sequence[bytes]  # the pieces of its frame
    answer: asyncio.Future[Any]

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(map(len, self.request))


class _Jobs:
    """Those that wait, the oldest first."""

    def __init__(self) -> None:
        self._waiting: list[_Job] = []
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, job: _Job) -> None:
        self._waiting.append(job)
        self._arrived.set()

    async def get(self, largest: int | None) -> _Job:
        """Waits for one of at most so many bytes."""
        while (at := self._first(largest)) is None:
            self._arrived.clear()
            await self._arrived.wait()
        return self._waiting.pop(at)

    def _first(self, largest: int | None) -> int | None:
        fitting = (
            at
            for at in range(len(self._waiting))
            if largest is None or self._waiting[at].size <= largest
        )
        return next(fitting, None)

    def clear(self) -> None:
        while self._waiting:
            self._waiting.pop().answer.cancel()


class HelperPool:
    """Processes that all do the same kind of job; use from one event loop.

    Args:
        target: "package.module:function" that is called with ``config`` in each new process and
            returns the handler, which takes a request and returns a reply or raises
            :class:`quire.serve.helper_process.Refused`. All of these are values of JSON.
    """

    def __init__(self, target: str, config: Any, limits: HelperLimits | None = None) -> None:
        self.limits = limits or HelperLimits()
        self._setup = Setup(
            target,
            config,
            self.limits.memory,
            self.limits.seconds,
            self.limits.limit_address_space,
        )
        self._jobs = _Jobs()
        self._keepers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> HelperPool:
        self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def start(self) -> None:
        """Start the processes, in the background."""
        assert not self._keepers, "the pool has been started"
        largest: list[int | None] = [None] * self.limits.processes
        if len(largest) > 1:
            largest[-1] = self.limits.reserved
        self._keepers = [asyncio.create_task(self._keep(size)) for size in largest]

    async def close(self) -> None:
        """End the processes, working or not; jobs that wait are dropped."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        self._keepers = []
        self._jobs.clear()

    async def call(self, request: Any, payload: Sequence[bytes] = ()) -> Any:
        """The reply to one request. A caller that is cancelled leaves no trace.

        Args:
            request: what msgspec writes as JSON.
            payload: bytes that go with the request, in pieces, each of which is written by itself.

        Raises:
            HelperError: one of its kinds; no other job is harmed.
        """
        if not self._keepers:
            raise HelperFailed("the helper processes are not running")
        frame = [pack_request(request, sum(map(len, payload))), *payload]
        job = _Job(frame, asyncio.get_running_loop().create_future())
        del frame
        try:
            if len(self._jobs) >= self.limits.waiting:
                raise HelperBusy(f"{self.limits.waiting} jobs wait for a helper process")
            self._jobs.put(job)
            return await job.answer
        finally:
            # An error's traceback has this frame, and the job has the error.
            del job, payload

    async def call_surviving(self, request: Any, payload: Sequence[bytes] = ()) -> Any:
        """Like :meth:`call`, once more where the process died: perhaps it had died before."""
        try:
            return await self.call(request, payload)
        except HelperCrashed:
            return await self.call(request, payload)

    async def _keep(self, largest: int | None) -> None:
        """One process and its successors: hands each job of at most so many bytes to the one that
        lives."""
        helper: Helper | None = None
        eager = self.limits.eager
        try:
            while True:
                if helper is None and eager:
                    # Started before there is work. Should that fail, the next job tries again and
                    # is told why.
                    with contextlib.suppress(Exception):
                        helper = await Helper.start(self._setup)
                # No variable here holds the job while the next one is waited for: it may be large.
                helper = await self._hand_over(await self._jobs.get(largest), helper)
                eager = True
        finally:
            if helper is not None:
                await helper.end()

    async def _hand_over(self, job: _Job, helper: Helper | None) -> Helper | None:
        """Answer ``job`` with ``helper``, or a new one; the one for the next job is returned."""
        if job.answer.done():  # the caller has gone
            return helper
        try:
            if helper is None:
                helper = await Helper.start(self._setup)
            reply = await helper.work(job.request)
        except HelperError as error:
            if helper is not None and not helper.is_usable:
                logger.warning("A helper process was replaced: %s", error)
                await helper.end()
                helper = None
            if not job.answer.done():
                job.answer.set_exception(error)
        except Exception:
            # Without its keeper a process would get no job any more, and jobs no answer.
            logger.exception("A job of a helper process failed")
            if helper is not None:
                await helper.end()
                helper = None
            if not job.answer.done():
                job.answer.set_exception(HelperFailed("the job failed; the log says why"))
        except asyncio.CancelledError:
            job.answer.cancel()
            if helper is not None:
                await helper.end()
            raise
        else:
            if not job.answer.done():
                job.answer.set_result(reply)
        finally:
            del job  # as in call()
        return helper
