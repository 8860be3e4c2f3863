"""Owns the worker process: starts it, watches it, restarts it, and sees it out."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import itertools
import logging
import os
import signal
import time
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import Callable, Sequence

import msgspec

from quire.engine.messages import (
    FromWorker,
    LoadFailed,
    LoadProgress,
    Ready,
    Shutdown,
    StepOutput,
    WorkerConfig,
)
from quire.serve.channel import Channel
from quire.serve.load_clock import LoadClock
from quire.serve.watchdog import AnswerPipe, step_limit, until_hung
from quire.serve.worker_client import WorkerClient, WorkerState

logger = logging.getLogger("quire.supervisor")

FIRST_BACKOFF = 0.5  # seconds; doubles with every failure in a row
MAX_BACKOFF = 30.0
HEALTHY_AFTER = 60.0  # a worker that was ready this long starts the back-off afresh
LEAVE_TIMEOUT = 10.0  # seconds between Shutdown and SIGKILL
# The first load is tried again if the worker was killed over it, for instance by a system without
# memory, but not for ever.
FIRST_LOADS = 4
_FRAMES_PER_TURN = 16  # at most, before the streams' readers run
_MAX_LINE = 8192  # characters of the worker's output that are kept for the end of a line
_LAST_FRAMES = 0.1  # how long an exited worker's last frames may take to arrive


class StartupFailed(Exception):
    """The first worker never became ready; the message is one line for the user.

    ``permanent``: the worker said why, and another start cannot do better.
    """

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class ModelChanged(Exception):
    """The model's files are not those that the first worker loaded."""


class Supervisor:
    """Keeps one worker running and tells ``client`` which one.

    The worker reads ``config`` from its standard input, which then stays open as its life line:
    it leaves when that closes, so it cannot outlive this process however this process ends.
    """

    def __init__(
        self,
        client: WorkerClient,
        config: WorkerConfig,
        command: Sequence[str],
        *,
        on_output: Callable[[str], None] = lambda line: None,
        on_progress: Callable[[LoadProgress], None] = lambda progress: None,
        on_ready: Callable[[Ready], None] = lambda ready: None,
        is_changed: Callable[[], bool] = lambda: False,
        step_timeout: float | None = None,
        first_backoff: float = FIRST_BACKOFF,
    ) -> None:
        """
        Args:
            is_changed: whether the model's files have changed; asked before each restart.
            step_timeout: seconds after which a step is taken to be endless; None: as the warm-up
                suggests.
        """
        self._client = client
        self._config = config
        self._command = list(command)
        self._on_output = on_output
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._is_changed = is_changed
        self._step_timeout = step_timeout
        self._first_backoff = first_backoff
        self._stopping = asyncio.Event()
        self._process: Process | None = None
        self._load_error: str | None = None
        self._was_killed = False  # the latest worker: by a signal, or for hanging
        self._loading = LoadClock()
        self._ready_at: float | None = None  # of the current worker
        self._load_seconds: float | None = None  # the latest load; None until one succeeded

    async def run(self) -> None:
        """Run workers until :meth:`stop`, or until one dies while draining.

        Raises:
            StartupFailed: none ever became ready.
            ModelChanged: the next one would load other files than the first.
        """
        backoff = self._first_backoff
        for number in itertools.count(1):
            failure = await self._run_worker()
            # A worker that dies while draining has no successor: its requests have failed.
            if self._stopping.is_set() or self._client.state is WorkerState.DRAINING:
                return
            if self._load_seconds is None and (not self._was_killed or number == FIRST_LOADS):
                raise StartupFailed(failure, permanent=self._load_error is not None)
            if self._ready_at and time.monotonic() - self._ready_at >= HEALTHY_AFTER:
                backoff = self._first_backoff
            logger.error("%s Restarting in %g s.", failure, backoff)
            self._client.metrics.worker_restarts.inc()
            if self._load_seconds is not None:
                self._client.expect_ready_by(time.monotonic() + backoff + self._load_seconds)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff)
                return
            if self._is_changed():
                raise ModelChanged
            backoff = min(2 * backoff, MAX_BACKOFF)

    async def drain(self, grace: float) -> None:
        """Refuse new requests and give the running ones ``grace`` seconds to finish."""
        self._client.start_draining()
        try:
            await asyncio.wait_for(self._client.wait_idle(), grace)
        except TimeoutError:
            logger.warning(
                "%d requests were still running after %g s and are cut off.",
                self._client.num_in_flight,
                grace,
            )
            self._client.fail_all("The server is shutting down.")

    def stop(self) -> None:
        """Let the worker leave and :meth:`run` return."""
        self._stopping.set()

    def kill(self) -> None:
        """Like :meth:`stop`, but the worker gets no time."""
        self._stopping.set()
        if self._process is not None:
            _kill(self._process)

    async def _run_worker(self) -> str:
        """Run one worker to its end; returns how it ended, as a sentence."""
        self._load_error = None
        self._was_killed = False
        self._ready_at = None
        self._loading = LoadClock()
        failure = "The worker was given up."
        try:
            with (
                contextlib.closing(Channel()) as channel,
                contextlib.closing(AnswerPipe()) as answers,
            ):
                process = await self._spawn(channel, answers)
                self._client.attach(channel)
                self._client.metrics.worker.pid = process.pid
                failure = await self._watch(process, channel, answers)
        except OSError as error:
            failure = f"The worker could not be run: {error}."
        finally:
            self._client.detach(f"{failure} This request was lost; try it again.")
        return failure

    async def _spawn(self, channel: Channel, answers: AnswerPipe) -> Process:
        config = msgspec.structs.replace(
            self._config,
            request_address=channel.request_address,
            output_address=channel.output_address,
            answers=answers.for_worker,
        )
        # A session of its own keeps Ctrl-C in a terminal from reaching the worker before the
        # drain. What it prints is read here, so that it never waits for whoever reads the log.
        self._process = process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=PIPE,
            stdout=PIPE,
            stderr=STDOUT,
            start_new_session=True,
            pass_fds=(answers.for_worker,),
            env={**os.environ, "TMPDIR": str(channel.folder)},
        )
        answers.spawned()
        assert process.stdin is not None
        # A worker that died at once is reported by its exit code.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(msgspec.json.encode(config) + b"\n")
            await process.stdin.drain()
        return process

    async def _watch(self, process: Process, channel: Channel, answers: AnswerPipe) -> str:
        exited = asyncio.ensure_future(process.wait())
        receiving = asyncio.ensure_future(self._receive(channel))
        stopping = asyncio.ensure_future(self._stopping.wait())
        printing = asyncio.ensure_future(self._read_output(process))
        hanging = asyncio.ensure_future(self._until_hung(process, answers))
        try:
            await asyncio.wait(
                {exited, receiving, stopping, hanging}, return_when=asyncio.FIRST_COMPLETED
            )
            if hanging.done() and not exited.done():
                self._was_killed = True
                # A process that hangs in a driver does not die at once either.
                self._client.detach(f"{hanging.result()} This request was lost; try it again.")
                return hanging.result()
            if stopping.done() and not exited.done():
                await self._see_out(exited, channel)
            self._client.dying()
            receiving.cancel()
            await asyncio.wait({receiving})
            if not receiving.cancelled():
                return f"The worker sent a broken frame ({receiving.exception()})."
            if exited.done():
                while (frame := await channel.receive_within(_LAST_FRAMES)) is not None:
                    self._handle(frame)
        finally:
            for task in (receiving, stopping, hanging):
                task.cancel()
            if not exited.done():
                _kill(process)
            await exited
            # Its last words come before what is said of it; a child of its own may keep the pipe.
            await asyncio.wait({printing}, timeout=_LAST_FRAMES)
            printing.cancel()
            assert process.stdin is not None
            process.stdin.close()
        self._was_killed = exited.result() < 0
        return self._load_error or f"The worker {_describe(exited.result())}."

    async def _until_hung(self, process: Process, answers: AnswerPipe) -> str:
        stdin = process.stdin
        assert stdin is not None

        async def work() -> None:
            if self._ready_at is not None:
                await self._client.wait_busy()

        def limit() -> float | None:
            if self._ready_at is None:
                return None
            return self._step_timeout or step_limit(self._loading.last_stage)

        return await until_hung(lambda: stdin.write(b"\n"), answers, work, limit)

    async def _read_output(self, process: Process) -> None:
        """Pass on what the worker prints, line by line, to its end."""
        assert process.stdout is not None
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        rest = ""
        while data := await process.stdout.read(2**16):
            *lines, rest = (rest + decoder.decode(data)).split("\n")
            for line in lines:
                self._on_output(line.rstrip("\r"))
            if len(rest) > _MAX_LINE:
                self._on_output(rest)
                rest = ""
        if rest:
            self._on_output(rest)

    async def _see_out(self, exited: asyncio.Future[int], channel: Channel) -> None:
        # One that is still loading does not read requests; there is nothing to lose either.
        if self._ready_at is None or not channel.send(Shutdown()):
            return
        done, _ = await asyncio.wait({exited}, timeout=LEAVE_TIMEOUT)
        if not done:
            logger.warning("The worker did not leave within %g s; killing it.", LEAVE_TIMEOUT)

    async def _receive(self, channel: Channel) -> None:
        """Handle frames until cancelled. Raises msgspec.DecodeError for one that is not ours."""
        for count in itertools.count(1):
            frame = await channel.receive()
            if isinstance(frame, Ready):
                await channel.connected()
            self._handle(frame)
            # receive() does not yield while frames are waiting, so readers that are late get
            # several steps in one output. They need a turn even if frames never stop waiting.
            if count % _FRAMES_PER_TURN == 0:
                await asyncio.sleep(0)

    def _handle(self, frame: FromWorker) -> None:
        match frame:
            case StepOutput():
                self._client.deliver(frame)
            case LoadProgress():
                self._loading.enter(frame.stage)
                self._on_progress(frame)
            case LoadFailed():
                self._load_error = frame.message
            case Ready():
                self._ready_at = time.monotonic()
                self._loading.stop()
                self._load_seconds = self._loading.total
                logger.info("worker: ready after %s", self._loading)
                self._client.ready(frame)
                self._on_ready(frame)


def _kill(process: Process) -> None:
    # It may be dead already without the event loop having noticed.
    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:
            process.kill()


def _describe(returncode: int) -> str:
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"
