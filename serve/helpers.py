"""Helper processes for work that cannot be trusted to end: a fixed few, each killed and replaced
when a job takes too long, takes too much memory or crashes.

A thread will not do: nothing ends a thread that loops, and what it holds of the interpreter's lock
or of the machine's memory is everybody's loss.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from quire.serve.helper_process import LENGTH_BYTES, MAX_REPLY_BYTES, Setup, pack_request
from quire.serve.process_memory import resident_bytes

logger = logging.getLogger("quire.helpers")

# Not `-m`, which would run the module as __main__ and leave handlers with a second Refused.
_PROGRAM: Final = "import sys; from quire.serve.helper_process import main; sys.exit(main())"
_WATCH_SECONDS: Final = 0.02  # between two looks at a working helper's memory
_START_SECONDS: Final = 120.0  # a vocabulary of 250,000 tokens takes seconds to read


class HelperError(Exception):
    """A job came to nothing. The message is one line."""


class HelperRefused(HelperError):
    """The job ended with an answer, and the answer is no; ``details`` says why."""

    def __init__(self, details: Any) -> None:
        super().__init__(str(details))
        self.details = details


class HelperTimeout(HelperError):
    """The job was stopped when its time was over."""


class HelperOutOfMemory(HelperError):
    """The job wanted more memory than it may take."""


class HelperCrashed(HelperError):
    """The process died over the job, or before."""


class HelperFailed(HelperError):
    """The process could not be started, or its code failed."""


class HelperBusy(HelperError):
    """Too many jobs wait already."""


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
        helper: _Helper | None = None
        eager = self.limits.eager
        try:
            while True:
                if helper is None and eager:
                    # Started before there is work. Should that fail, the next job tries again and
                    # is told why.
                    with contextlib.suppress(HelperError):
                        helper = await _Helper.start(self._setup)
                # No variable here holds the job while the next one is waited for: it may be large.
                helper = await self._hand_over(await self._jobs.get(largest), helper)
                eager = True
        finally:
            if helper is not None:
                await helper.end()

    async def _hand_over(self, job: _Job, helper: _Helper | None) -> _Helper | None:
        """Answer ``job`` with ``helper``, or a new one; the one for the next job is returned."""
        if job.answer.done():  # the caller has gone
            return helper
        try:
            if helper is None:
                helper = await _Helper.start(self._setup)
            reply = await helper.work(job.request)
        except HelperError as error:
            if helper is not None and not helper.is_usable:
                logger.warning("A helper process was replaced: %s", error)
                await helper.end()
                helper = None
            if not job.answer.done():
                job.answer.set_exception(error)
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


class _Helper:
    """One process, from its start to its end."""

    def __init__(self, process: asyncio.subprocess.Process, setup: Setup) -> None:
        self._process = process
        self._setup = setup
        self._resident_limit = 0
        self.is_usable = True

    @classmethod
    async def start(cls, setup: Setup) -> _Helper:
        """Raises :class:`HelperError`."""
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # never import from the folder the server was started in
                "-c",
                _PROGRAM,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # A terminal's Ctrl-C is for the front end, which still drains.
                start_new_session=True,
                # Threads take address space, which is limited, each for a heap of its own.
                env={**os.environ, "MALLOC_ARENA_MAX": "1", "RAYON_NUM_THREADS": "1"},
            )
        except OSError as error:
            raise HelperFailed(f"a helper process could not be started: {error}") from error
        helper = cls(process, setup)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await helper._exchange([pack_request(setup)])
        except TimeoutError:
            await helper.end()
            raise HelperTimeout(
                f"a helper process took over {_START_SECONDS:.0f} s to start"
            ) from None
        except HelperCrashed as error:
            await helper.end()
            raise HelperFailed(f"it could not be started: {error}") from None
        except BaseException:
            await helper.end()
            raise
        helper._resident_limit = resident_bytes(process.pid) + setup.memory
        return helper

    async def work(self, request: Sequence[bytes]) -> Any:
        """The reply to a packed request, in pieces. Raises :class:`HelperError`."""
        watch = asyncio.create_task(self._watch_memory())
        try:
            async with asyncio.timeout(self._setup.seconds):
                return await self._exchange(request)
        except TimeoutError:
            self.is_usable = False
            raise HelperTimeout(f"stopped after {self._setup.seconds:g} s") from None
        except HelperCrashed:
            if watch.done():  # only ends where memory ran over
                raise HelperOutOfMemory(self._over_memory) from None
            raise
        finally:
            watch.cancel()

    async def end(self) -> None:
        self.is_usable = False
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await asyncio.shield(self._process.wait())

    @property
    def _over_memory(self) -> str:
        return f"stopped at {self._setup.memory >> 20} MiB of memory"

    async def _watch_memory(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            if resident_bytes(self._process.pid) > self._resident_limit:
                self._process.kill()
                return

    async def _exchange(self, frame: Sequence[bytes]) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            for piece in frame:
                stdin.write(piece)
                await stdin.drain()
            size = int.from_bytes(await stdout.readexactly(LENGTH_BYTES), "big")
            if size > MAX_REPLY_BYTES:
                self.is_usable = False
                raise HelperFailed("a helper process sent a broken frame")
            kind, value = msgspec.json.decode(await stdout.readexactly(size))
        except (OSError, asyncio.IncompleteReadError):
            self.is_usable = False
            code = await self._process.wait()
            raise HelperCrashed(f"the helper process died with exit code {code}") from None
        except (msgspec.DecodeError, ValueError):
            self.is_usable = False
            raise HelperFailed("a helper process sent a broken frame") from None
        match kind:
            case "refused":
                raise HelperRefused(value)
            case "memory":
                # Its heap is in pieces now; a fresh process is cheaper than to find out.
                self.is_usable = False
                raise HelperOutOfMemory(self._over_memory)
            case "failed":
                raise HelperFailed(str(value))
        return value
