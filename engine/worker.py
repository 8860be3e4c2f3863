"""The worker process: one model, one thread that builds MLX's graphs, frames in and frames out.

Started by the front end as `python -m quire.engine.worker`, with its configuration as one line of
JSON on standard input. Standard input stays open as a life line (:mod:`quire.engine.life_line`).
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from array import array
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
import zmq

from quire.engine import messages
from quire.engine.device_thread import DeviceThread
from quire.engine.errors import EngineError
from quire.engine.life_line import LifeLine
from quire.engine.messages import (
    Abort,
    FromWorker,
    GenerateRequest,
    LoadFailed,
    LoadProgress,
    Shutdown,
    StepOutput,
    TokenOutput,
    WorkerConfig,
)
from quire.engine.startup.boot import prepare_mlx
from quire.engine.startup.lean_import import import_mlx_lm

logger = logging.getLogger("quire.worker")

_STATS_INTERVAL = 0.2  # seconds
# How long one thread's Python code may keep the other from going on.
_SWITCH_INTERVAL = 100e-6  # seconds
_IDLE_LOOK_MS = 10_000  # between looks at the machine's memory while nothing runs
_LINGER_MS = 2000  # how long a leaving worker waits for its last frames to be taken


class Worker:
    """Moves frames between the sockets and the engine."""

    def __init__(self, config: WorkerConfig, life_line: LifeLine) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._config = config
        self._life_line = life_line
        self._inbox = context.socket(zmq.PULL)
        self._inbox.connect(config.request_address)
        self._outbox = context.socket(zmq.PUSH)
        self._outbox.setsockopt(zmq.LINGER, _LINGER_MS)
        self._outbox.set_hwm(0)  # the front end counts requests; tokens are never dropped
        self._outbox.connect(config.output_address)
        self._stopping = False
        self._refused: list[TokenOutput] = []
        self._stats_sent = 0.0

    def run(self, notes: list[str]) -> int:
        """Load the model and serve until told to stop; returns the exit code."""
        # Imported late: BLAS must be in place before mlx is.
        import_mlx_lm()
        from quire.engine.startup.start import start_engine

        try:
            startup = start_engine(self._config, notes, self._progress)
        except EngineError as error:
            self._send(LoadFailed(str(error)))
            return 1
        self._engine = startup.engine
        self._vocab_size = startup.ready.vocab_size
        self._send(startup.ready)
        # All that stays: to walk it takes some 30 ms, in which no stream gets a token.
        gc.collect()
        gc.freeze()
        if self._engine.encodes_ahead:
            self._serve_beside_device()
        else:
            self._serve()
        return 0

    def close(self) -> None:
        self._inbox.close(linger=0)
        self._outbox.close()
        zmq.Context.instance().term()

    def _serve(self) -> None:
        while not self._stopping:
            if self._engine.has_work or self._refused:
                self._step()
            else:
                self._send(StepOutput([], self._engine.stats()))
                while not self._inbox.poll(_IDLE_LOOK_MS):
                    self._engine.relieve(time.monotonic())
                self._handle(self._inbox.recv())

    def _serve_beside_device(self) -> None:
        """Serve on a second thread; this one, whose MLX's streams are, encodes steps for it."""
        sys.setswitchinterval(_SWITCH_INTERVAL)
        device = DeviceThread()
        self._engine.encode_on(device)
        device.run_beside(self._serve)

    def _step(self) -> None:
        self._life_line.begin_step()
        outputs = self._engine.step(self._receive, self._send_outputs)
        self._life_line.end_step()
        outputs += self._refused
        self._refused = []
        now = time.monotonic()
        is_due = now - self._stats_sent >= _STATS_INTERVAL
        if is_due:
            self._stats_sent = now
            self._engine.relieve(now)
        if outputs or is_due:
            self._send(StepOutput(outputs, self._engine.stats() if is_due else None))

    def _send_outputs(self, outputs: list[TokenOutput]) -> None:
        self._send(StepOutput(outputs))

    def _receive(self) -> None:
        while True:
            try:
                frame = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._handle(frame)

    def _handle(self, frame: bytes) -> None:
        message = messages.decode_to_worker(frame)
        match message:
            case GenerateRequest():
                self._submit(message)
            case Abort():
                self._engine.abort(message.request_id)
            case Shutdown():
                self._stopping = True

    def _submit(self, request: GenerateRequest) -> None:
        try:
            # An id beyond the embedding table reads foreign memory instead of failing, one beyond
            # the logits writes to those of somebody else.
            if not all(_all_below(self._vocab_size, ids) for ids in _token_ids(request)):
                raise ValueError(f"token ids must be between 0 and {self._vocab_size - 1}")
            self._engine.submit(request)
        except (EngineError, ValueError) as error:
            self._refused.append(TokenOutput(request.request_id, [], "error", error=str(error)))

    def _progress(self, stage: str, done: int, total: int) -> None:
        self._send(LoadProgress(stage, done, total))

    def _send(self, message: FromWorker) -> None:
        self._outbox.send(messages.encode(message))


def _token_ids(request: GenerateRequest) -> Iterator[Sequence[int]]:
    """All that a request names."""
    sampling, thinking = request.sampling, request.thinking
    yield request.prompt_token_ids
    yield request.stop_token_ids
    yield [*sampling.logit_bias]
    yield sampling.allowed_token_ids
    yield from sampling.bad_words
    if thinking is not None:
        yield from (thinking.open_token_ids, thinking.close_token_ids, thinking.then_token_ids)


def _all_below(size: int, token_ids: Sequence[int]) -> bool:
    """Whether all ids are from 0 to ``size - 1``; there may be 200,000."""
    try:
        ids = array("I", token_ids)
    except OverflowError:
        return False
    return not ids or int(np.frombuffer(ids, np.uint32).max()) < size


def main() -> int:
    # The front end decides when to stop; a Ctrl-C or a service manager signals the whole group.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    line = b""
    while not line.endswith(b"\n"):  # unbuffered, so that the life line sees every later byte
        byte = os.read(0, 1)
        if not byte:
            return 0
        line += byte
    config = msgspec.json.decode(line, type=WorkerConfig)
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    life_line = LifeLine(config.answers)
    life_line.start()
    note = prepare_mlx(config.device)
    worker = Worker(config, life_line)
    try:
        return worker.run([] if note is None else [note])
    finally:
        worker.close()


if __name__ == "__main__":
    sys.exit(main())
