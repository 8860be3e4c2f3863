"""HAProxy with the package's configuration, in front of two real servers."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import pytest
from live_server import PATIENCE, SMALL, Server, eventually

from quire.loadtest.model_folder import make_model

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(
        not shutil.which("haproxy"), reason="haproxy is not installed (apt-get install haproxy)"
    ),
]
TOKENS = 200


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    make_model(folder, SMALL)
    return folder


def start(model: Path, port: int) -> Server:
    flags = "--kv-cache-memory", "8MiB", "--port", str(port)
    return Server(*flags, model=model).wait_ready()


@pytest.fixture
def servers(small_model: Path) -> Iterator[list[Server]]:
    started = [start(small_model, free_port()) for _ in range(2)]
    yield started
    for server in started:
        server.stop()


@pytest.fixture
def router(servers: list[Server], tmp_path: Path) -> Iterator[str]:
    """The address of HAProxy."""
    config, port = files("quire.deploy").joinpath("haproxy.cfg").read_text(), free_port()
    for known, server in zip(("127.0.0.1:8000", "127.0.0.1:8001"), servers, strict=True):
        assert known in config
        config = config.replace(known, server.url.removeprefix("http://"))
    # mlx-lm, once imported, lowers the limit of open files, of this process's children too.
    assert "maxconn 4096" in config
    config = config.replace("maxconn 4096", "maxconn 256")
    assert "127.0.0.1:8080" in config
    (tmp_path / "haproxy.cfg").write_text(config.replace("127.0.0.1:8080", f"127.0.0.1:{port}"))
    process = subprocess.Popen(
        ["haproxy", "-db", "-f", str(tmp_path / "haproxy.cfg")], stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    eventually(lambda: ask(url, tokens=1)[0] == 200, "the router answers")
    yield url
    process.terminate()
    process.wait(PATIENCE)


def ask(url: str, tokens: int = TOKENS, stream: bool = False) -> tuple[int, str]:
    """The status and the whole answer; 0 where none came, or not to its end."""
    body = {"model": "small", "prompt": "abc", "max_tokens": tokens, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps({**body, "stream": stream}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except (OSError, http.client.HTTPException):
        return 0, ""


def finished(server: Server) -> float:
    counts = server.metrics()
    return sum(value for name, value in counts.items() if re.match("quire_requests_total", name))


def begin(url: str, pool: ThreadPoolExecutor, servers: list[Server]) -> list[Future]:
    """Streams through the router, some of which each server has begun."""
    streams = [pool.submit(ask, url, TOKENS * 4, True) for _ in range(8)]
    for server in servers:
        eventually(lambda: server.metrics()["quire_requests_running"], "it has some")  # noqa: B023
    return streams


def test_requests_are_spread_over_both(servers: list[Server], router: str) -> None:
    before = [finished(server) for server in servers]
    with ThreadPoolExecutor(8) as pool:
        answers = [*pool.map(lambda _: ask(router), range(24))]
    assert {status for status, _ in answers} == {200}
    assert min(finished(s) - b for s, b in zip(servers, before, strict=True)) >= 4


def test_a_dead_worker_gets_no_requests_until_it_is_back(
    servers: list[Server], router: str
) -> None:
    first = servers[0]
    os.kill(first.worker_pid(), signal.SIGKILL)
    eventually(lambda: first.get("/ready")[0] == 503, "its death is noticed")
    while first.get("/ready")[0] == 503:
        assert ask(router, tokens=4)[0] == 200
    before = finished(first)
    eventually(lambda: ask(router, 4)[0] == 200 and finished(first) > before, "it takes requests")


def test_a_server_is_replaced_without_a_loss(
    servers: list[Server], router: str, small_model: Path
) -> None:
    """Streams that it has begun go on to their end; new requests go to the other one."""
    first = servers[0]
    port = int(first.url.rpartition(":")[2])
    with ThreadPoolExecutor(8) as pool:
        streams = begin(router, pool, servers)
        first.process.send_signal(signal.SIGTERM)
        while first.process.poll() is None:
            assert ask(router, tokens=4)[0] == 200
        for stream in streams:
            status, text = stream.result()
            assert (status, text.rstrip().splitlines()[-1]) == (200, "data: [DONE]")
    assert first.stop() == 0
    servers[0] = start(small_model, port)
    eventually(
        lambda: ask(router, 4)[0] == 200 and finished(servers[0]) > 0, "the new one takes requests"
    )


def test_a_server_that_is_killed_is_left_out(servers: list[Server], router: str) -> None:
    """Its own streams break off; the other's do not, and whatever it had not begun is answered."""
    first, second = servers
    before = finished(second)
    with ThreadPoolExecutor(8) as pool:
        streams = begin(router, pool, servers)
        first.process.kill()
        first.process.wait()
        assert [ask(router, tokens=4)[0] for _ in range(10)] == [200] * 10
        whole = sum(stream.result()[1].endswith("[DONE]\n\n") for stream in streams)
    assert 0 < whole < len(streams)
    assert whole == finished(second) - before - 10
