"""One helper process, as the event loop sees it: a request goes in, a reply comes out.

Every chat passes through here, so a short job costs one future: asyncio's streams would wake the
loop for each part of a reply, and a task or a time limit of its own would cost each job more than
its template does. One timer looks after whatever job there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any, Final, cast

import msgspec

from quire.serve.helper_errors import (
    HelperCrashed,
    HelperError,
    HelperFailed,
    HelperOutOfMemory,
    HelperRefused,
    HelperTimeout,
)
from quire.serve.helper_process import LENGTH_BYTES, MAX_REPLY_BYTES, Setup, pack_request
from quire.serve.process_memory import resident_bytes

# Not `-m`, which would run the module as __main__ and leave handlers with a second Refused.
_PROGRAM: Final = "import sys; from quire.serve.helper_process import main; sys.exit(main())"
_WATCH_SECONDS: Final = 0.02  # between two looks at a working helper
_START_SECONDS: Final = 120.0  # a vocabulary of 250,000 tokens takes seconds to read


class Helper(asyncio.SubprocessProtocol):
    """A process from its start to its end; one job at a time.

    ``is_usable`` says whether it may get another. Made by :meth:`start`.
    """

    def __init__(self, setup: Setup) -> None:
        loop = asyncio.get_running_loop()
        self.is_usable = True
        self._loop = loop
        self._setup = setup
        self._resident_limit: int | None = None  # known once it is ready
        self._reply: asyncio.Future[bytes] = loop.create_future()
        self._received = bytearray()
        self._deadline = 0.0  # of the job, on the loop's clock
        self._timer: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._gone = loop.create_future()

    @classmethod
    async def start(cls, setup: Setup) -> Helper:
        """Raises :class:`HelperError`."""
        spawning = asyncio.create_task(cls._spawn(setup))
        try:
            helper = await asyncio.shield(spawning)
        except OSError as error:
            raise HelperFailed(f"a helper process could not be started: {error}") from error
        except asyncio.CancelledError:
            # uvloop forgets a process that it is told to start no more.
            with contextlib.suppress(OSError):
                await (await spawning).end()
            raise
        try:
            await helper._exchange([pack_request(setup)], _START_SECONDS)
        except HelperTimeout:
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
        helper._resident_limit = resident_bytes(helper._transport.get_pid()) + setup.memory
        return helper

    @classmethod
    async def _spawn(cls, setup: Setup) -> Helper:
        _, helper = await asyncio.get_running_loop().subprocess_exec(
            lambda: cls(setup),
            sys.executable,
            "-P",  # never import from the folder the server was started in
            "-c",
            _PROGRAM,
            stderr=None,
            # A terminal's Ctrl-C is for the front end, which still drains.
            start_new_session=True,
            # Threads take address space, which is limited, each for a heap of its own.
            env={**os.environ, "MALLOC_ARENA_MAX": "1", "RAYON_NUM_THREADS": "1"},
        )
        return helper

    async def work(self, request: Sequence[bytes]) -> Any:
        """The reply to a packed request, in pieces. Raises :class:`HelperError`."""
        return await self._exchange(request, self._setup.seconds)

    async def end(self) -> None:
        """Kill the process, working or not."""
        self.is_usable = False
        with contextlib.suppress(ProcessLookupError):
            self._transport.kill()
        await asyncio.shield(self._gone)

    async def _exchange(self, frame: Sequence[bytes], seconds: float) -> Any:
        reply = self._reply = self._loop.create_future()
        self._deadline = self._loop.time() + seconds
        if self._timer is None:
            self._timer = self._loop.call_later(_WATCH_SECONDS, self._look)
        if self._gone.done():
            self._fail(self._crashed())
        stdin = cast(asyncio.WriteTransport, self._transport.get_pipe_transport(0))
        for piece in frame:
            stdin.write(piece)
            if not self._writable.is_set():
                await self._writable.wait()
        try:
            kind, value = msgspec.json.decode(await reply)
        except (msgspec.DecodeError, ValueError):
            self.is_usable = False
            raise HelperFailed("a helper process sent a broken frame") from None
        match kind:
            case "refused":
                raise HelperRefused(value)
            case "memory":
                # Its heap is in pieces now; a fresh process is cheaper than to find out.
                self.is_usable = False
                raise self._out_of_memory()
            case "failed":
                raise HelperFailed(str(value))
        return value

    # ---- what may go wrong meanwhile

    def _look(self) -> None:
        """Ends a job that takes too long or too much."""
        self._timer = None
        if self._reply.done():
            return  # and none has come since
        left = self._deadline - self._loop.time()
        limit = self._resident_limit
        if left <= 0:
            self._fail(HelperTimeout(f"stopped after {self._setup.seconds:g} s"))
        elif limit is not None and resident_bytes(self._transport.get_pid()) > limit:
            self._transport.kill()
            self._fail(self._out_of_memory())
        else:
            self._timer = self._loop.call_later(min(left, _WATCH_SECONDS), self._look)

    def _fail(self, error: HelperError) -> None:
        self.is_usable = False
        self._writable.set()
        if not self._reply.done():
            self._reply.set_exception(error)
            # Its job may have been cancelled, and then nobody asks.
            self._reply.exception()

    def _crashed(self) -> HelperCrashed:
        code = self._transport.get_returncode()
        return HelperCrashed(f"the helper process died with exit code {code}")

    def _out_of_memory(self) -> HelperOutOfMemory:
        return HelperOutOfMemory(f"stopped at {self._setup.memory >> 20} MiB of memory")

    # ---- called by the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.SubprocessTransport, transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._received += data
        if len(self._received) < LENGTH_BYTES:
            return
        end = LENGTH_BYTES + int.from_bytes(self._received[:LENGTH_BYTES], "big")
        if end > LENGTH_BYTES + MAX_REPLY_BYTES:
            self._fail(HelperFailed("a helper process sent a broken frame"))
        elif len(self._received) >= end:
            frame = bytes(memoryview(self._received)[LENGTH_BYTES:end])
            self._received = bytearray()
            if not self._reply.done():
                self._reply.set_result(frame)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        """The process has ended, and all that it wrote has been read."""
        self._fail(self._crashed())
        self._transport.close()
        self._gone.set_result(None)
