"""Runs the supervisor over ``fake_worker.py`` for the tests of the process side."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.engine.messages import (
    GenerateRequest,
    LoadProgress,
    SamplingParams,
    TokenOutput,
    WorkerConfig,
)
from quire.serve.backend import UNNUMBERED
from quire.serve.metrics import Metrics
from quire.serve.supervisor import Supervisor
from quire.serve.worker_client import RequestStream, WorkerClient

FAKE_WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))
MODEL = "model"
LIMIT = 60.0  # seconds; only a hang gets this far


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        await asyncio.sleep(0.01)


async def collect(stream: RequestStream) -> list[TokenOutput]:
    return [output async for output in stream]


def tokens_of(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@dataclass
class Rig:
    client: WorkerClient
    supervisor: Supervisor
    metrics: Metrics
    progress: list[LoadProgress] = field(default_factory=list)
    running: asyncio.Task[None] | None = None

    def submit(self, prompt: list[int], max_tokens: int = 5) -> RequestStream:
        return self.client.submit(
            GenerateRequest(UNNUMBERED, prompt, max_tokens, SamplingParams(temperature=0))
        )

    def value(self, name: str, **labels: str) -> float:
        labels = {"model": MODEL, **labels}
        value = self.metrics.registry.get_sample_value(f"quire_{name}", labels)
        assert value is not None, name
        return value

    @property
    def pid(self) -> int:
        process = self.supervisor._process
        assert process is not None
        return process.pid

    async def ready(self) -> None:
        await until(lambda: self.client.info is not None)


@contextlib.asynccontextmanager
async def rig(
    mode: str = "ok",
    *,
    max_in_flight: int = 100,
    first_backoff: float = 0.01,
    wait: bool = True,
    **options: Any,
) -> AsyncIterator[Rig]:
    """A running supervisor with further ``options``; the worker is gone when the block ends."""
    metrics = Metrics()
    client = WorkerClient(metrics.for_model(MODEL), max_in_flight)
    progress: list[LoadProgress] = []
    supervisor = Supervisor(
        client,
        WorkerConfig("model", "", "", max_num_seqs=4),
        (*FAKE_WORKER, mode),
        on_progress=progress.append,
        first_backoff=first_backoff,
        **options,
    )
    rig = Rig(client, supervisor, metrics, progress)
    rig.running = asyncio.create_task(supervisor.run())
    try:
        if wait:
            await rig.ready()
        yield rig
    finally:
        supervisor.kill()
        await asyncio.wait({rig.running})
