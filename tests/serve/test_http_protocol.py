"""Connections before and around their requests: sizes, slowness, numbers, and who pays for whom."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from fake_backend import (
    MODEL,
    FakeBackend,
    Script,
    Server,
    one_model_app,
    post,
    ready,
    served_model,
)
from fake_backend import serving as serve_app

from quire.serve.errors import ApiError
from quire.serve.http_protocol import (
    ConnectionGuard,
    HttpLimits,
    connections_within,
    raise_descriptor_limit,
)

SERVED = served_model()
BODY = {"model": MODEL, "prompt": "hi", "max_tokens": 200}
PATH = "/v1/completions"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LIMIT = 30.0  # seconds; only a hang gets this far


@contextlib.contextmanager
def serving(
    *scripts: Script, limits: HttpLimits | None = None
) -> Iterator[tuple[Server, FakeBackend, list[ApiError]]]:
    backend = FakeBackend(list(scripts) or [Script([[0]])])
    refused: list[ApiError] = []
    guard = ConnectionGuard(limits or HttpLimits(), lambda error, client: refused.append(error))
    with serve_app(one_model_app(backend, SERVED), guard) as server:
        yield server, backend, refused


@pytest.fixture(scope="module")
def server():
    with serving() as (server, _, _):
        yield server


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def status_of(reply: bytes) -> int:
    """The status of a refusal, which must be one whole response with the error envelope."""
    head, _, body = reply.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert b"content-type: application/json" in lines
    assert b"connection: close" in lines
    assert b"content-length: %d" % len(body) in lines
    [(key, detail)] = json.loads(body).items()
    assert key == "error"
    assert set(detail) == {"message", "type", "param", "code"}
    return int(head.split()[1])


def head(*lines: bytes, target: bytes = b"/health") -> bytes:
    return b"\r\n".join([b"GET " + target + b" HTTP/1.1", b"Host: localhost", *lines, b"", b""])


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (head(b"X: " + b"a" * 40_000), 431),
        (head(b"X: " + b"a" * 5_000_000), 431),
        (head(b"a" * 40_000 + b": x"), 431),
        (head(*[b"X: y"] * 150), 431),
        (head(*[b"X: y"] * 100_000), 431),
        (head(target=b"/" + b"a" * 9000), 414),
        (head(target=b"/health?" + b"a" * 2_000_000), 414),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (head(b"Host: localhost"), 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS
        (head(b"Content-Length: 1", b"Content-Length: 2"), 400),
        (head(b"Content-Length: 1", b"Transfer-Encoding: chunked"), 400),
        (head(b" folded"), 400),
        (b"GET /health HTTP/9.9\r\n\r\n", 400),
    ],
)
def test_what_no_request_may_be_is_refused_in_the_envelope(server, request_bytes, status):
    with socket.create_connection((server.host, server.port), timeout=LIMIT) as connection:
        # It may be refused and closed before all of it is sent.
        with contextlib.suppress(ConnectionError):
            connection.sendall(request_bytes)
        assert status_of(read_all(connection)) == status
    assert server.request("GET", "/health").status == 200


@pytest.mark.parametrize("start", [head()[:-2] + b"X: ", b"GET /health?"])
def test_a_head_without_an_end_is_cut_off(server, start):
    """What the parser holds back until a line is complete is counted too."""
    sent = 0
    with socket.create_connection((server.host, server.port), timeout=LIMIT) as connection:
        connection.sendall(start)
        with contextlib.suppress(ConnectionError):
            while sent < 100_000_000:
                connection.sendall(b"a" * 1_000_000)
                sent += 1_000_000
    assert sent < 50_000_000


def test_a_body_of_nearly_nothing_but_framing_is_cut_off(server):
    start = post(PATH, BODY).partition(b"\r\n\r\n")[0]
    start = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", start)
    assert b"chunked" in start
    with socket.create_connection((server.host, server.port), timeout=LIMIT) as connection:
        connection.sendall(start + b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                connection.sendall(b"1;" + b"x" * 10_000 + b"\r\na\r\n")
        assert status_of(read_all(connection)[-1000:]) == 400


def test_a_body_in_chunks_of_one_byte_is_no_abuse(server):
    start, _, body = post(PATH, {**BODY, "prompt": "x" * 200}).partition(b"\r\n\r\n")
    lines = [line for line in start.split(b"\r\n") if not line.startswith(b"Content-Length")]
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    data = b"\r\n".join([*lines, b"Transfer-Encoding: chunked", b"", chunks + b"0\r\n\r\n"])
    with server.connect(data) as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_what_follows_a_body_adds_no_headers(server):
    start = post(PATH, BODY).partition(b"\r\n\r\n")[0]
    start = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", start)
    body = json.dumps(BODY).encode()
    data = start + b"\r\n\r\n%x\r\n%b\r\n0\r\nContent-Type: text/plain\r\n\r\n" % (len(body), body)
    with server.connect(data) as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_usual_heads_pass(server):
    reply = server.request("GET", "/health?" + "a" * 4000, headers={"Cookie": "c" * 20_000})
    assert reply.status == 200
    with server.connect(b"GET /health HTTP/1.0\r\n\r\n") as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 200")
    upgrade = head(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c")
    with server.connect(upgrade) as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_other_codings_and_tunnels_behind_an_upgrade(server):
    start, _, body = post(PATH, BODY).partition(b"\r\n\r\n")
    codings = b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked"
    lines = re.sub(rb"Content-Length: \d+", codings, start)
    chunk = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    statuses = set()
    for upgrade in (b"", b"\r\nConnection: Upgrade\r\nUpgrade: h2c"):
        with server.connect(lines + upgrade + b"\r\n\r\n" + chunk) as connection:
            statuses.add(connection.recv(1 << 16)[:12])
    assert len(statuses) == 1
    tunnel = b"CONNECT /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello"
    with server.connect(tunnel) as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("pieces", [1, 2, 50])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_body_behind_an_upgrade_is_read(server, chunked, pieces):
    """Java's client asks each server for HTTP/2."""
    lines, _, body = post(PATH, BODY).partition(b"\r\n\r\n")
    if chunked:
        lines = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", lines)
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA"
    data = lines + b"\r\n" + upgrade + b"\r\n\r\n" + body + HEALTH
    size = -(-len(data) // pieces)
    with server.connect(data[:size]) as connection:
        for start in range(size, len(data), size):
            time.sleep(0.002)
            connection.sendall(data[start : start + size])
        received = b""
        while b'"worker"' not in received:
            received += connection.recv(1 << 16)
    assert received.startswith(b"HTTP/1.1 200")
    assert received.count(b"HTTP/1.1 200") == 2


def test_pipelined_requests_are_answered_in_order_and_large_ones_counted_singly(server):
    requests = [head(b"X: " + b"a" * 20_000, target=b"/nope/%d" % i) for i in range(10)]
    with server.connect(b"".join(requests) + HEALTH) as connection:
        received = b""
        while b'"worker"' not in received:
            received += connection.recv(1 << 16)
    order = [received.index(b"/nope/%d;" % i) for i in range(10)]
    assert order == sorted(order)


def test_a_slow_head_is_told_so():
    with serving(limits=HttpLimits(head_timeout=0.1)) as (server, _, refused):
        with server.connect(HEALTH[:-2]) as connection:
            assert status_of(read_all(connection)) == 408
        # A complete request in front of it is answered first.
        with server.connect(HEALTH + HEALTH[:-2]) as connection:
            assert read_all(connection).startswith(b"HTTP/1.1 200")
        assert {error.status for error in refused} == {408}


def test_a_slow_head_behind_a_running_answer_does_not_cut_it():
    script = Script([[0], "hold", [0]])
    with serving(script, limits=HttpLimits(head_timeout=0.05)) as (server, _, _):
        request = post(PATH, {**BODY, "stream": True})
        with server.connect(request + HEALTH[:-2]) as connection:
            received = connection.recv(1 << 16)
            time.sleep(0.2)
            script.released = True
            while b"[DONE]" not in received:
                data = connection.recv(1 << 16)
                assert data
                received += data


@pytest.mark.parametrize("first", [b"", HEALTH, b"\r\n"])
def test_a_connection_without_a_request_is_closed(first):
    with serving(limits=HttpLimits(idle_timeout=0.1)) as (server, _, refused):
        with server.connect(first) as connection:
            reply = read_all(connection)
        assert reply.startswith(b"HTTP/1.1 200") if first == HEALTH else reply == b""
        assert refused == []


def test_an_idle_connection_makes_room_and_a_working_one_does_not():
    script = Script([[0], "hold", [0]])
    limits = HttpLimits(max_connections=2)
    with serving(script, limits=limits) as (server, _, refused), contextlib.ExitStack() as stack:
        stream = stack.enter_context(server.connect(post(PATH, {**BODY, "stream": True})))
        received = stream.recv(1 << 16)
        idle = stack.enter_context(server.connect(HEALTH))
        assert idle.recv(1 << 16).startswith(b"HTTP/1.1 200")
        with server.connect(HEALTH) as third:
            assert third.recv(1 << 16).startswith(b"HTTP/1.1 200")
            assert idle.recv(1) == b""
        slow = stack.enter_context(server.connect(HEALTH[:10]))
        assert server.request("GET", "/health").status == 200  # in the slow one's place
        assert slow.recv(1) == b""
        body = {**BODY, "stream": True}
        second = stack.enter_context(server.connect(post(PATH, body)))
        second.recv(1 << 16)
        with server.connect(HEALTH) as full:
            reply = read_all(full)
            assert status_of(reply) == 503
            assert b"retry-after: 1\r\n" in reply.lower()
        script.released = True
        while b"[DONE]" not in received:
            received += stream.recv(1 << 16)
        assert [error.status for error in refused] == [503]


def test_a_crowd_of_idle_and_slow_connections_costs_a_stream_nothing():
    script = Script([[0], "hold", *[[0]] * 50])
    limits = HttpLimits(max_connections=40)
    with serving(script, limits=limits) as (server, backend, _), contextlib.ExitStack() as stack:
        stream = stack.enter_context(server.connect(post(PATH, {**BODY, "stream": True})))
        received = stream.recv(1 << 16)
        for data in [b"", HEALTH[:5], HEALTH] * 60:
            with contextlib.suppress(ConnectionError):
                stack.enter_context(server.connect(data))
        assert server.request("GET", "/health").status == 200
        script.released = True
        while b"[DONE]" not in received:
            received += stream.recv(1 << 16)
        assert received.count(b"data: {") == 51
        assert backend.streams[0].close_reasons == []


def test_a_client_that_reads_nothing_is_given_up():
    """Its request is aborted; one that reads slowly is waited for."""
    steps = [[0] * 200] * 100_000
    limits = HttpLimits(write_timeout=0.2)
    body = {**BODY, "stream": True, "max_tokens": 10**7, "ignore_eos": True}
    with serving(Script(steps), limits=limits) as (server, backend, refused):
        backend.info = ready(max_model_len=10**8)
        with socket.create_connection((server.host, server.port), timeout=LIMIT) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(post(PATH, body))
            until(lambda: backend.streams and not backend.active)
        assert backend.streams[0].close_reasons == ["abort"]
        assert [error.status for error in refused] == [408]


@pytest.mark.parametrize(
    ("buffer", "size", "is_given_up"), [(4096, 1, True), (1 << 17, 1 << 16, False)]
)
def test_a_client_that_reads_next_to_nothing_is_given_up_too(buffer, size, is_given_up):
    steps = [[0] * 200] * 100_000
    limits = HttpLimits(write_timeout=0.5)
    body = {**BODY, "stream": True, "max_tokens": 10**7, "ignore_eos": True}
    with serving(Script(steps), limits=limits) as (server, backend, refused):
        backend.info = ready(max_model_len=10**8)
        with socket.create_connection((server.host, server.port), timeout=LIMIT) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            connection.sendall(post(PATH, body))
            until(lambda: bool(backend.streams))
            for _ in range(200):
                if not backend.active:
                    break
                with contextlib.suppress(ConnectionError):
                    connection.recv(size)
                time.sleep(0.02)
            assert (backend.active == 0) is is_given_up, [e.message for e in refused]
        until(lambda: not backend.active)
        assert [error.status for error in refused] == ([408] if is_given_up else [])


def test_connections_leave_descriptors_for_the_worker():
    assert connections_within(8192) == 4096
    assert connections_within(1024) == 1024 - 128
    assert connections_within(64) == 16


def test_the_descriptor_limit_is_raised_as_far_as_allowed():
    program = (
        "import resource; from quire.serve.http_protocol import raise_descriptor_limit;"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}));"
        "print(raise_descriptor_limit(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    for hard, expected in ((300, 300), (64, 64)):
        result = subprocess.run(
            [sys.executable, "-c", program.format(hard=hard)], capture_output=True, text=True
        )
        assert result.stdout.split() == [str(expected)] * 2, result.stderr
    assert raise_descriptor_limit() >= min(8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
