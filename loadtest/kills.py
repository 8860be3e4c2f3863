"""How soon a server notices that a process of its own has died or hangs, and serves again.

`python -m quire.loadtest.kills --out kills.json` serves two models, kills their workers with
SIGKILL at random moments, stops some with SIGSTOP, and in the end kills the front end. What is
asked of it: no connection is refused, requests of a dead worker end within 1 s, a model answers
again after the back-off, its load and 2 s, a stop is found within 15 s, and nothing is left of a
server. A load is what passes from a new worker to its first answer. Linux only, as it reads /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import shlex
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from quire.loadtest import environment
from quire.loadtest.environment import Environment
from quire.loadtest.http import BaseURL, EventParser, ProtocolError, Truncated, send
from quire.loadtest.result_file import FORMAT_VERSION, save
from quire.loadtest.servers import ServerProcess, ServerSpec, copy_demo, find_openblas, running
from quire.loadtest.soak_samples import family

MODELS: Final = ("first", "second")
MOMENTS: Final = ("loading", "prefill", "decode", "idle", "two models")
ERROR_SECONDS: Final = 1.0
SLACK_SECONDS: Final = 2.0
STOP_SECONDS: Final = 15.0
_PATIENCE: Final = 180.0  # seconds
_TOKENS: Final = 400
_PAUSE: Final = 0.02
# Kills that come faster than workers get healthy are a crash loop: with --healthy 0 all workers are
# healthy at once, so that each restart has the first back-off.
_HEALTHY_AT_ONCE: Final = (
    "import sys; from quire.serve import cli, supervisor; supervisor.HEALTHY_AFTER = 0.0; "
    "sys.exit(cli.main(sys.argv[1:]))"
)


class Kill(msgspec.Struct):
    """Times in seconds from the signal on."""

    moment: str
    requests: int  # that the worker had
    errors: float | None  # until the last of them had its error; None: there were none
    spawned: float  # until there was another worker
    ready: float  # until that model answered again
    backoff: float  # as the server said


class End(msgspec.Struct):
    """Of the front end, by SIGKILL."""

    processes_gone: float = 0.0  # seconds until no worker and no helper ran
    port_free: bool = False
    left_behind: int = 0  # folders of the dead server
    left_after_next_start: int = 0


class KillsResult(msgspec.Struct, tag="kills", tag_field="kind"):
    command: str
    kills: list[Kill]
    stops: list[Kill]
    end: End
    polls: int  # of /health, each on a connection of its own
    longest_poll: float  # seconds
    failures: list[str]  # polls without an answer, and streams that ended as none may
    load_seconds: float  # median, from a new worker to its first answer
    broken: list[str]  # bounds that did not hold
    environment: Environment
    format_version: int = FORMAT_VERSION


class Options(msgspec.Struct, frozen=True):
    kills: int
    stops: int
    healthy: float  # seconds that a worker runs before it is killed
    seed: int


async def measure(options: Options) -> KillsResult:
    """Raises TimeoutError where the server does not come back, and OSError without /proc."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["TMPDIR"] = str(root / "tmp")
        (root / "tmp").mkdir()
        spec = _spec(copy_demo(root, MODELS), options)
        with running(spec, root / "log") as server:
            measurement = _Measurement(options, server, root / "log")
            result = await measurement.run()
            dead = server.pid
            result.end = await _kill_front_end(server, root / "tmp")
        with running(spec, root / "log") as server:
            await _Measurement(options, server, root / "log").answers(MODELS[0])
            result.end.left_after_next_start = len(_folders(root / "tmp", dead))
    result.broken = list(broken(result))
    return result


def _spec(folders: dict[str, Path], options: Options) -> ServerSpec:
    program = ["-m", "quire.serve.cli"] if options.healthy else ["-c", _HEALTHY_AT_ONCE]
    command = [sys.executable, *program, "serve", "--kv-cache-memory", "16MiB"]
    command += ["--model", str(folders[MODELS[0]]), "--served-model-name", MODELS[0]]
    command += ["--models", f"{MODELS[1]}={folders[MODELS[1]]}"]
    return ServerSpec("quire", tuple(command), model=MODELS[0], preload=find_openblas())


class _Stream:
    """One streamed answer."""

    def __init__(self, base: BaseURL, model: str, prompt: str) -> None:
        self.model = model
        self.began = asyncio.Event()
        self.ended = ""  # "whole", "error", or what was wrong
        self.ended_at = 0.0
        self.task = asyncio.create_task(self._run(base, prompt))

    async def _run(self, base: BaseURL, prompt: str) -> None:
        try:
            self.ended = await self._read(base, prompt)
        except (OSError, Truncated, ProtocolError) as error:
            self.ended = repr(error)
        self.ended_at = time.monotonic()
        self.began.set()

    async def _read(self, base: BaseURL, prompt: str) -> str:
        request = {"model": self.model, "prompt": prompt, "max_tokens": _TOKENS, "stream": True}
        body = json.dumps({**request, "ignore_eos": True}).encode()
        events = EventParser()
        async with send(base, "POST", "/v1/completions", body) as response:
            if response.status in (500, 503):
                return "error"
            async for data in response:
                for event in events.feed(data):
                    self.began.set()
                    if event == b"[DONE]":
                        return "whole"
                    if "error" in json.loads(event):
                        return "error"
        return f"status {response.status}, no end"


class _Measurement:
    def __init__(self, options: Options, server: ServerProcess, log: Path) -> None:
        self._options = options
        self._server = server
        self._log = log
        self._draw = random.Random(options.seed)
        self._pids: dict[str, int] = {}  # of the models' workers
        self._polls: list[float] = []
        self._failures: list[str] = []

    async def run(self) -> KillsResult:
        """Its ``end`` and ``broken`` are still to be filled in."""
        for name in MODELS:  # the second is loaded when it is asked for
            await self.answers(name)
            self._pids[name] = await self._new_worker()
        polling = asyncio.create_task(self._poll())
        # Every moment equally often, in any order.
        moments = [MOMENTS[n % len(MOMENTS)] for n in range(self._options.kills)]
        kills: list[Kill] = []
        stops: list[Kill] = []
        try:
            for moment in self._draw.sample(moments, len(moments)):
                kills.append(await self._kill(moment, signal.SIGKILL))
                print(kills[-1], file=sys.stderr, flush=True)
            for _ in range(self._options.stops):
                stops.append(await self._kill("decode", signal.SIGSTOP))
                print(stops[-1], file=sys.stderr, flush=True)
        finally:
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)
        return KillsResult(
            command=shlex.join(["python", "-m", "quire.loadtest.kills", *sys.argv[1:]]),
            kills=kills,
            stops=stops,
            end=End(),
            polls=len(self._polls),
            longest_poll=max(self._polls),
            failures=self._failures,
            load_seconds=statistics.median(kill.ready - kill.spawned for kill in kills),
            broken=[],
            environment=environment.describe(),
        )

    async def _poll(self) -> None:
        while True:
            began = time.monotonic()
            try:
                async with send(self._server.base, "GET", "/health") as response:
                    await response.read()
            except (OSError, Truncated, ProtocolError) as error:
                self._failures.append(f"/health: {error!r}")
            self._polls.append(time.monotonic() - began)
            await asyncio.sleep(_PAUSE)

    async def answers(self, name: str) -> None:
        """Return once the model does. Raises TimeoutError."""
        body = json.dumps({"model": name, "prompt": "a", "max_tokens": 1}).encode()
        async with asyncio.timeout(_PATIENCE):
            while True:
                with contextlib.suppress(OSError, Truncated, ProtocolError):
                    async with send(self._server.base, "POST", "/v1/completions", body) as response:
                        await response.read()
                    if response.status == 200:
                        return
                await asyncio.sleep(_PAUSE)

    async def _new_worker(self) -> int:
        """Its process, once there is one more than is known. Raises TimeoutError."""
        async with asyncio.timeout(_PATIENCE):
            while True:
                for pid, role in family(self._server.pid).items():
                    if role == "worker" and pid not in self._pids.values():
                        return pid
                await asyncio.sleep(_PAUSE)

    async def _return_of(self, name: str) -> tuple[float, float]:
        """When there is another worker, and when it answers. Raises TimeoutError."""
        self._pids[name] = await self._new_worker()
        spawned_at = time.monotonic()
        await self.answers(name)
        return spawned_at, time.monotonic()

    async def _kill(self, moment: str, how: signal.Signals) -> Kill:
        """Raises TimeoutError where the model does not come back."""
        await asyncio.sleep(self._options.healthy)
        name = self._draw.choice(MODELS)
        if moment == "loading":
            os.kill(self._pids[name], signal.SIGKILL)
            self._pids[name] = await self._new_worker()
        streams = await self._streams(moment, name)
        await asyncio.sleep(self._draw.uniform(0.05, 0.5))
        began = time.monotonic()
        os.kill(self._pids[name], how)
        returning = asyncio.create_task(self._return_of(name))
        await asyncio.gather(*(stream.task for stream in streams))
        lost = [stream for stream in streams if stream.ended == "error"]
        for stream in streams:
            if stream.ended != "whole" and (stream not in lost or stream.model != name):
                self._failures.append(f"{moment}: a stream of {stream.model}: {stream.ended}")
        spawned_at, ready_at = await returning
        return Kill(
            moment,
            requests=len(lost),
            errors=max((stream.ended_at - began for stream in lost), default=None),
            spawned=spawned_at - began,
            ready=ready_at - began,
            backoff=self._last_backoff(),
        )

    async def _streams(self, moment: str, name: str) -> list[_Stream]:
        """The requests that the server has at that moment; those of a prefill have no token yet."""
        asked = {"prefill": [name] * 3, "decode": [name] * 3, "two models": [*MODELS] * 2}
        prompt = "word " * 300 if moment == "prefill" else "a"
        streams = [_Stream(self._server.base, model, prompt) for model in asked.get(moment, [])]
        if moment != "prefill":
            await asyncio.gather(*(stream.began.wait() for stream in streams))
        return streams

    def _last_backoff(self) -> float:
        found: list[str] = re.findall(r"Restarting in ([0-9.]+) s", self._log.read_text())
        return float(found[-1]) if found else 0.0


async def _kill_front_end(server: ServerProcess, folder: Path) -> End:
    others = [pid for pid in family(server.pid) if pid != server.pid]
    began = time.monotonic()
    os.kill(server.pid, signal.SIGKILL)
    await server.wait_exit(_PATIENCE)
    while any(_is_running(pid) for pid in others):
        await asyncio.sleep(_PAUSE)
        if time.monotonic() - began > _PATIENCE:
            break
    gone = time.monotonic() - began
    try:
        with socket.create_server((server.base.host, server.base.port)):
            port_free = True
    except OSError:
        port_free = False
    return End(gone, port_free, len(_folders(folder, server.pid)))


def _is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def _folders(folder: Path, pid: int) -> list[Path]:
    """Of the workers of that front end."""
    return [*folder.glob(f"*/{pid}-*")]


def broken(result: KillsResult) -> Iterator[str]:
    yield from result.failures
    for kill in result.kills:
        if kill.errors is not None and kill.errors > ERROR_SECONDS:
            yield f"{kill.moment}: requests ended after {kill.errors:.1f} s"
        if kill.spawned > kill.backoff + SLACK_SECONDS:
            late = kill.spawned - kill.backoff
            yield f"{kill.moment}: a new worker {late:.1f} s after the back-off"
    for stop in result.stops:
        if stop.errors is None or stop.errors > STOP_SECONDS:
            yield f"a stop was found after {stop.errors} s"
    end = result.end
    if not end.port_free or end.left_after_next_start or end.processes_gone > _PATIENCE:
        yield f"the front end left something: {end}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quire.loadtest.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stops", type=int, default=3)
    parser.add_argument(
        "--healthy", type=float, default=61.0, help="seconds before each; 0: none are asked for"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    result = asyncio.run(measure(Options(**arguments)))
    if out is not None:
        save(out, result)
    errors = [kill.errors for kill in result.kills if kill.errors is not None]
    late = [kill.spawned - kill.backoff for kill in result.kills]
    print(
        f"{len(result.kills)} kills: errors after {max(errors):.2f} s at most; a new worker "
        f"{max(late):.1f} s at most after the back-off, its load {result.load_seconds:.1f} s; "
        f"stops found after {[stop.errors for stop in result.stops]} s; {result.polls} polls, the "
        f"longest {result.longest_poll:.2f} s; {result.end}"
    )
    for line in result.broken:
        print(f"does not hold: {line}")
    return 1 if result.broken else 0


if __name__ == "__main__":
    sys.exit(main())
