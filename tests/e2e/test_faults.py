"""What happens when things die: clients, the worker, the server itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import threading
from pathlib import Path

import openai
import pytest
from live_server import Server, eventually, is_running, workers
from openai import OpenAI

MODEL = "small"
LONG = {"model": MODEL, "prompt": "abc", "max_tokens": 900, "temperature": 0}


@pytest.fixture
def own_server(small_model: Path):
    started = Server("--kv-cache-memory", "4MiB", model=small_model).wait_ready()
    yield started
    if started.process.poll() is None:
        started.process.kill()
    started.stop()


async def hang_up(server: Server, body: dict[str, object], after_bytes: int | None) -> None:
    """Send a request; read ``after_bytes`` of the answer, or all of it if None; close."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    payload = json.dumps(body).encode()
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(payload), payload)
        )
        await writer.drain()
        if after_bytes is None:
            answer = await reader.read()
            assert b"200 OK" in answer[:20], answer[:300]
        elif after_bytes:
            await reader.read(after_bytes)
    finally:
        writer.transport.abort()


def test_clients_that_hang_up_leave_nothing_behind(server: Server) -> None:
    """500 requests, a third of which are dropped at random moments, streamed or not."""
    draw = random.Random(0)
    before = server.metrics()

    async def client(jobs: list[int]) -> None:
        while jobs:
            index = jobs.pop()
            body = {
                "model": MODEL,
                "prompt": "x" * draw.randint(1, 200),
                "max_tokens": draw.randint(1, 40),
                "stream": bool(index % 2),
                "ignore_eos": True,
            }
            if index % 3 == 0:
                body["max_tokens"] = 600
                pause = draw.random() * 0.05
                task = asyncio.create_task(hang_up(server, body, draw.choice([0, 1, 400])))
                done, _ = await asyncio.wait([task], timeout=pause)
                if not done:
                    task.cancel()  # closes the socket in the middle of whatever it was doing
                with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                    await task
            else:
                await hang_up(server, body, None)

    async def crowd() -> None:
        jobs = list(range(500))
        await asyncio.gather(*(client(jobs) for _ in range(24)))

    asyncio.run(crowd())

    after = server.idle_metrics()
    total = sum(after[f'quire_kv_blocks{{state="{s}"}}'] for s in ("used", "cached", "free"))
    assert total == sum(
        before[f'quire_kv_blocks{{state="{s}"}}'] for s in ("used", "cached", "free")
    )
    name = 'quire_requests_total{finish_reason="%s"}'
    finished = {r: after[name % r] - before[name % r] for r in ("length", "abort", "error")}
    assert finished["error"] == 0
    assert finished["length"] >= 333
    assert finished["abort"] > 20
    status, _, body = server.post("/v1/completions", {**LONG, "max_tokens": 3})
    assert status == 200, body


def test_a_killed_worker_fails_its_requests_and_comes_back(own_server: Server) -> None:
    server = own_server
    client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    stream = client.completions.create(**LONG, stream=True)
    next(stream)
    whole: list[object] = []
    thread = threading.Thread(
        target=lambda: whole.append(server.post("/v1/completions", LONG)), daemon=True
    )
    thread.start()
    eventually(lambda: server.metrics()["quire_requests_running"] == 2, "both requests run")
    worker = server.worker_pid()
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(openai.APIError, match=r"(?i)worker"):
        for _ in stream:
            pass
    thread.join()
    status, _, body = whole[0]  # type: ignore[misc]
    assert status == 500
    assert json.loads(body)["error"]["type"] == "server_error"

    status, headers, body = server.post("/v1/completions", LONG)
    assert status == 503, "answered before a new worker can have loaded"
    assert int(headers["retry-after"]) >= 1
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert server.get("/ready")[0] == 503
    assert server.get("/health")[0] in (200, 503)

    eventually(lambda: server.get("/ready")[0] == 200, "the new worker is ready")
    assert server.worker_pid() != worker
    status, _, body = server.post("/v1/completions", {**LONG, "max_tokens": 5})
    assert status == 200
    metrics = server.metrics()
    assert metrics["quire_worker_restarts_total"] == 1
    assert metrics['quire_requests_total{finish_reason="error"}'] == 2
    client.close()


def test_sigterm_finishes_running_requests_and_exits_0(own_server: Server) -> None:
    server = own_server
    worker = server.worker_pid()
    client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    stream = client.completions.create(**LONG, stream=True)
    next(stream)
    server.process.send_signal(signal.SIGTERM)

    def refused() -> bool:
        try:
            return server.post("/v1/completions", {**LONG, "max_tokens": 1})[0] == 503
        except OSError:
            return True

    eventually(refused, "new requests are refused")
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    client.close()
    assert server.process.wait(60) == 0
    eventually(lambda: not is_running(worker), "the worker is gone")


def test_a_killed_front_end_takes_its_worker_along(own_server: Server) -> None:
    worker = own_server.worker_pid()
    own_server.process.kill()
    own_server.process.wait()
    eventually(lambda: not is_running(worker), "the worker is gone")
    assert workers(own_server.process.pid) == []


def test_one_bad_request_harms_nobody_else(server: Server) -> None:
    client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    good = client.completions.create(model=MODEL, prompt="abc", max_tokens=200, stream=True)
    next(good)
    bad: list[dict[str, object]] = [
        {"model": MODEL, "prompt": [999999], "max_tokens": 1},
        {"model": MODEL, "prompt": [], "max_tokens": 1},
        {"model": MODEL, "prompt": [-1], "max_tokens": 1},
        {"model": MODEL, "prompt": "abc" * 1000},
        {"model": MODEL, "prompt": "abc", "temperature": 9},
        {"model": MODEL, "prompt": "abc", "logprobs": 30},
        {"model": MODEL, "prompt": "abc", "unheard_of": 3},
    ]
    for body in bad:
        status, _, text = server.post("/v1/completions", body)
        assert status == 400, (body, text)
        assert json.loads(text)["error"]["param"].partition("[")[0] in body
    chunks = list(good)
    assert chunks[-1].choices[0].finish_reason == "length"
    client.close()
