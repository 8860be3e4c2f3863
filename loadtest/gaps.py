"""What disturbs running streams: scrapes of /metrics, and request bodies at the limit of size.

`python -m quire.loadtest.gaps --out gaps.json` runs streams on the demo model, in turns left alone
and disturbed, and compares the longest gap within a stream, the longest answer of /health, and the
front end's memory before and after. Linux only, since it reads /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing
import shlex
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import msgspec

from quire.loadtest import environment
from quire.loadtest.chat import Target, stream_chat
from quire.loadtest.environment import Environment
from quire.loadtest.http import BaseURL, send
from quire.loadtest.records import RequestRecord
from quire.loadtest.result_file import FORMAT_VERSION, save
from quire.loadtest.serve import LoadOptions
from quire.loadtest.servers import ServerSpec, find_openblas, running
from quire.loadtest.soak_samples import Sampler
from quire.loadtest.stall import gaps_between
from quire.loadtest.stats import percentile
from quire.loadtest.workloads import WorkloadSpec

_MODEL = "quire-demo"
_READY_SECONDS = 300.0
_SCRAPE_PAUSE = 0.25  # seconds; Prometheus asks every 15 s
_HEALTH_PAUSE = 0.02
_BODIES = 8
_BODY_BYTES = 32 * 2**20  # serve's default limit
_TOKENS = 1500
_PAUSE = 2.0  # seconds between turns, which belong to none


class Options(msgspec.Struct, frozen=True):
    streams: int
    rounds: int
    seconds: float  # of each turn


class Turn(msgspec.Struct):
    """Times in ms."""

    name: str  # "alone", "scrapes" or "bodies"
    start: float
    end: float
    longest_gap: float = 0.0
    p99_gap: float = 0.0
    median_gap: float = 0.0
    longest_health: float = 0.0
    p99_health: float = 0.0
    requests: int = 0  # that disturbed
    memory_before: int = 0  # of the front end, anonymous, in KiB
    memory_after: int = 0


class GapsResult(msgspec.Struct, tag="gaps", tag_field="kind"):
    command: str
    streams: int
    turns: list[Turn]
    environment: Environment
    format_version: int = FORMAT_VERSION


async def measure(options: Options) -> GapsResult:
    """Raises ServerError where the server does not start, and OSError where there is no /proc."""
    command = (sys.executable, "-m", "quire.serve.cli", "serve", "--log-level", "warning")
    with running(ServerSpec("quire", command, model=_MODEL, preload=find_openblas())) as server:
        target, _ = await server.wait_ready(
            LoadOptions(WorkloadSpec(), ignore_eos=True), _READY_SECONDS
        )
        # What the demo model writes behind an end is mostly special tokens, which have no text.
        target = msgspec.structs.replace(target, token_ids=True)
        return await _Measurement(options, target, Sampler(server.base, server.pid, {})).run()


class _Measurement:
    def __init__(self, options: Options, target: Target, sampler: Sampler) -> None:
        self._options = options
        self._target = target
        self._base: BaseURL = target.base
        self._sampler = sampler
        self._epoch = time.perf_counter()
        self._records: list[RequestRecord] = []
        self._health: list[tuple[float, float]] = []  # when asked, and how long it took

    async def run(self) -> GapsResult:
        options = self._options
        tasks = [asyncio.create_task(self._stream(n)) for n in range(options.streams)]
        tasks.append(asyncio.create_task(self._watch_health()))
        turns: list[Turn] = []
        disturb: dict[str, Callable[[float], Awaitable[int]]] = {
            "alone": self._nothing,
            "scrapes": self._scrape,
            "bodies": self._send_bodies,
        }
        try:
            while not self._all_run():  # noqa: ASYNC110 - the streams do not know of each other
                await asyncio.sleep(0.1)
            for _ in range(options.rounds):
                for name, work in disturb.items():
                    await asyncio.sleep(_PAUSE)
                    turns.append(await self._turn(name, work))
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        if failed := [error for error in ended if isinstance(error, Exception)]:
            raise failed[0]
        for turn in turns:
            self._judge(turn)
        return GapsResult(
            command=shlex.join(["python", "-m", "quire.loadtest.gaps", *sys.argv[1:]]),
            streams=options.streams,
            turns=turns,
            environment=environment.describe(),
        )

    def _all_run(self) -> bool:
        return len(self._records) >= self._options.streams and all(
            record.chunk_ms for record in self._records
        )

    async def _turn(self, name: str, work: Callable[[float], Awaitable[int]]) -> Turn:
        before = await self._memory()
        turn = Turn(name, self._now(), 0.0, memory_before=before)
        turn.requests = await work(self._options.seconds)
        turn.end = self._now()
        await asyncio.sleep(_PAUSE)
        turn.memory_after = await self._memory()
        return turn

    def _judge(self, turn: Turn) -> None:
        gaps = [
            gap
            for record in self._records
            for gap in gaps_between(
                [record.start_ms + ms for ms in record.chunk_ms], turn.start, turn.end
            )
        ]
        turn.longest_gap, turn.median_gap = max(gaps), statistics.median(gaps)
        turn.p99_gap = percentile(sorted(gaps), 99)
        took = [took for at, took in self._health if turn.start <= at <= turn.end]
        turn.longest_health, turn.p99_health = max(took), percentile(sorted(took), 99)

    def _now(self) -> float:
        return 1e3 * (time.perf_counter() - self._epoch)

    async def _memory(self) -> int:
        sample = await self._sampler.sample()
        return sample.of("front end")[0].anonymous

    async def _stream(self, index: int) -> None:
        """One answer after the other. Raises RuntimeError where one fails."""
        while True:
            messages = [{"role": "user", "content": f"Stream {index}"}]
            record = RequestRecord(
                index=index,
                client=index,
                turn=0,
                prompt_chars=len(messages[0]["content"]),
                max_tokens=_TOKENS,
                chunk_ms=[],
            )
            self._records.append(record)
            await stream_chat(self._target, messages, record, self._epoch)
            if record.error is not None:
                raise RuntimeError(record.error.message)

    async def _watch_health(self) -> None:
        while True:
            began = self._now()
            async with send(self._base, "GET", "/health") as response:
                await response.read()
            self._health.append((began, self._now() - began))
            await asyncio.sleep(_HEALTH_PAUSE)

    async def _nothing(self, seconds: float) -> int:
        await asyncio.sleep(seconds)
        return 0

    async def _scrape(self, seconds: float) -> int:
        end, count = time.perf_counter() + seconds, 0
        while time.perf_counter() < end:
            await self._sampler.scrape()
            count += 1
            await asyncio.sleep(_SCRAPE_PAUSE)
        return count

    async def _send_bodies(self, seconds: float) -> int:
        """From a process of its own, so that sending does not disturb the watching."""
        loop = asyncio.get_running_loop()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return await loop.run_in_executor(
                pool, send_bodies, self._base.host, self._base.port, seconds
            )


def send_bodies(host: str, port: int, seconds: float) -> int:
    """So many at once, over and over; returns how many.

    All are refused, since no model takes such a prompt. Raises RuntimeError where one is not.
    """
    frame = {"model": _MODEL, "messages": [{"role": "user", "content": ""}]}
    room = _BODY_BYTES - len(json.dumps(frame))
    frame["messages"] = [{"role": "user", "content": ("word " * (room // 5 + 1))[:room]}]
    body = json.dumps(frame).encode()

    def one(_: int) -> None:
        with contextlib.closing(http.client.HTTPConnection(host, port)) as connection:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", body, headers)
            response = connection.getresponse()
            text = response.read()
            if response.status != 400:
                raise RuntimeError(f"status {response.status}: {text[:200]!r}")

    end, count = time.perf_counter() + seconds, 0
    with ThreadPoolExecutor(_BODIES) as threads:
        while time.perf_counter() < end:
            count += len([*threads.map(one, range(_BODIES))])
    return count


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m quire.loadtest.gaps", description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each turn (10)")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    result = asyncio.run(measure(Options(**arguments)))
    if out is not None:
        save(out, result)
    for turn in result.turns:
        print(
            f"{turn.name}: gaps {turn.median_gap:.1f} ms, p99 {turn.p99_gap:.0f}, longest "
            f"{turn.longest_gap:.0f}; /health p99 {turn.p99_health:.0f}, longest "
            f"{turn.longest_health:.0f}; {turn.requests} requests; front end "
            f"{turn.memory_before / 1024:.1f} to {turn.memory_after / 1024:.1f} MiB"
        )


if __name__ == "__main__":
    main()
