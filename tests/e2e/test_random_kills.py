"""A real worker is killed or stopped at random moments: all requests end, HTTP never refuses.

The long versions run by `make test-faults`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import PATIENCE, Server, eventually, is_running, workers

MODEL = "small"
SCRIPT = Path(__file__).with_name("serve_without_backoff.py")
MOMENTS = ("loading", "prefill", "decode", "idle")


@pytest.fixture
def server(small_model: Path) -> Iterator[Server]:
    flags = ("--kv-cache-memory", "4MiB")
    started = Server(*flags, model=small_model, script=SCRIPT).wait_ready()
    yield started
    assert started.stop() == 0


class Poller(threading.Thread):
    """Asks for /health and /metrics on new connections, over and over, and keeps what failed."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._address = server.url.removeprefix("http://")
        self.failures: list[str] = []
        self.answers = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            for path in ("/health", "/metrics"):
                connection = http.client.HTTPConnection(self._address, timeout=PATIENCE)
                try:
                    connection.request("GET", path)
                    status = connection.getresponse().status
                    self.answers += 1
                    if status not in (200, 503) or (path == "/metrics" and status != 200):
                        self.failures.append(f"{path}: {status}")
                except OSError as error:
                    self.failures.append(f"{path}: {error!r}")
                finally:
                    connection.close()
            time.sleep(0.02)


class Client(threading.Thread):
    """One request, streamed or whole; ``outcome`` says how it ended."""

    def __init__(self, server: Server, prompt: str, stream: bool) -> None:
        super().__init__(daemon=True)
        self._address = server.url.removeprefix("http://")
        self._body = {
            **{"model": MODEL, "prompt": prompt, "max_tokens": 400, "ignore_eos": True},
            **{"temperature": 0, "stream": stream},
        }
        self.first = threading.Event()
        self.outcome = "running"

    def run(self) -> None:
        try:
            self.outcome = self._ask()
        except OSError as error:
            self.outcome = f"connection: {error!r}"
        finally:
            self.first.set()

    def _ask(self) -> str:
        with contextlib.closing(
            http.client.HTTPConnection(self._address, timeout=PATIENCE)
        ) as connection:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(self._body), headers)
            with connection.getresponse() as response:
                return self._read(response)

    def _read(self, response: http.client.HTTPResponse) -> str:
        if response.status != 200 or not self._body["stream"]:
            body = json.loads(response.read())
            return "whole" if response.status == 200 else f"{response.status} {set(body)}"
        events = []
        for line in response:
            if line.startswith(b"data: "):
                events.append(line)
                self.first.set()
        if events[-1] == b"data: [DONE]\n":
            return "whole"
        return "error" if "error" in json.loads(events[-1][6:]) else f"cut: {events[-1]!r}"


def kill_at(moment: str, server: Server, draw: random.Random, how: signal.Signals) -> list[Client]:
    """Signal the worker at ``moment``; returns the requests that it had then."""
    if moment == "loading":
        count, first = restarts(server), server.worker_pid()
        os.kill(first, signal.SIGKILL)
        eventually(lambda: restarts(server) > count, "its death is noticed")
        eventually(lambda: set(workers(server.process.pid)) - {first}, "the next worker is there")
        time.sleep(draw.random())
        os.kill(server.worker_pid(), how)
        # It may have been ready already; then the server is for as long as it has not noticed.
        eventually(lambda: restarts(server) > count + 1, "the next worker's death is noticed")
        return []
    prompts = {"prefill": "x" * 600, "decode": "abc", "idle": ""}
    clients = [
        Client(server, prompts[moment], stream) for stream in (True, True, False) if prompts[moment]
    ]
    for client in clients:
        client.start()
    if moment == "decode":
        clients[0].first.wait(PATIENCE)
    time.sleep(0.3 * draw.random())
    os.kill(server.worker_pid(), how)
    return clients


def restarts(server: Server) -> float:
    return server.metrics()["quire_worker_restarts_total"]


def check_kills(server: Server, moments: list[str], how: signal.Signals) -> None:
    draw = random.Random(len(moments))
    poller = Poller(server)
    poller.start()
    for moment in moments:
        eventually(lambda: server.get("/ready")[0] == 200, "a worker is ready")
        before, count = server.worker_pid(), restarts(server)
        for client in kill_at(moment, server, draw, how):
            client.join(PATIENCE)
            assert client.outcome in ("whole", "error", "500 {'error'}", "503 {'error'}"), moment
        if how is signal.SIGSTOP and moment == "idle":
            client = Client(server, "abc", stream=True)  # the one that finds it
            client.start()
            client.join(PATIENCE)
            assert client.outcome == "error"
        eventually(lambda: not is_running(before), f"the worker is gone ({moment})")  # noqa: B023
        eventually(lambda: restarts(server) > count, "its death is noticed")  # noqa: B023
    eventually(lambda: server.get("/ready")[0] == 200, "a worker is ready")
    status, _, body = server.post("/v1/completions", {"model": MODEL, "prompt": "a"})
    assert status == 200, body
    poller.done.set()
    poller.join(PATIENCE)
    assert poller.failures == []
    assert poller.answers > 10 * len(moments)
    assert server.idle_metrics()["quire_worker_restarts_total"] >= len(moments)


def test_a_kill_at_each_kind_of_moment(server: Server) -> None:
    check_kills(server, list(MOMENTS), signal.SIGKILL)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_fifty_kills_at_random_moments(server: Server) -> None:
    draw = random.Random(0)
    check_kills(server, [draw.choice(MOMENTS) for _ in range(50)], signal.SIGKILL)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_stop_at_each_kind_of_moment_but_loading(server: Server) -> None:
    check_kills(server, ["prefill", "decode", "idle"] * 2, signal.SIGSTOP)
