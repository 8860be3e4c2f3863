"""Connections that send nothing, send slowly or read nothing, beside streams that lose nothing.

The long version runs by `make test-faults`.
"""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from live_server import PATIENCE, Server, eventually

MODEL = "small"
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n"
)


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < 4096:
        pytest.skip("this system allows too few open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def connect(server: Server, stack: contextlib.ExitStack) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return stack.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE))


def request(**fields: object) -> bytes:
    body = json.dumps({"model": MODEL, "ignore_eos": True, "temperature": 0, **fields}).encode()
    return HEAD % len(body) + body


def whole_answer(server: Server) -> str:
    """The text of one stream, which must end as it should."""
    with contextlib.ExitStack() as stack:
        connection = connect(server, stack)
        connection.sendall(request(prompt="abc", max_tokens=200, stream=True))
        data = b""
        while b"data: [DONE]\n\n" not in data:
            more = connection.recv(65536)
            assert more, data[-300:]
            data += more
    events = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: {")]
    chunks = [json.loads(event) for event in events]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def check(server: Server, *, idle: int, slow: int, deaf: int, streams: int, rounds: int) -> None:
    expected = whole_answer(server)
    answers: list[str] = []

    def work() -> None:
        answers.extend(whole_answer(server) for _ in range(rounds))

    with contextlib.ExitStack() as stack:
        for _ in range(idle):
            connect(server, stack)
        drips = [connect(server, stack) for _ in range(slow)]
        for connection in drips:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHo")
        for _ in range(deaf):
            connection = connect(server, stack)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.sendall(request(prompt="x", max_tokens=900, stream=True))
        threads = [threading.Thread(target=work) for _ in range(streams)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for connection in drips:
                with contextlib.suppress(OSError):
                    connection.sendall(b"s")
            time.sleep(0.2)
        assert answers == [expected] * (streams * rounds)
        assert server.get("/health")[0] == 200
        eventually(lambda: all(map(is_answered, drips)), "the slow ones are answered and closed")

    assert server.idle_metrics()["quire_worker_restarts_total"] == 0


def is_answered(connection: socket.socket) -> bool:
    """Whether the server has said why, in the envelope of all errors, or has closed."""
    connection.setblocking(False)
    try:
        data = connection.recv(65536)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.setblocking(True)
    if data:
        head, _, body = data.partition(b"\r\n\r\n")
        assert b" 408 " in head.split(b"\r\n")[0] or b" 400 " in head.split(b"\r\n")[0], head
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    return True


def test_some_useless_connections(server: Server, many_descriptors: None) -> None:
    check(server, idle=60, slow=40, deaf=6, streams=3, rounds=1)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_thousand_useless_connections(server: Server, many_descriptors: None) -> None:
    check(server, idle=1000, slow=1000, deaf=100, streams=16, rounds=3)
