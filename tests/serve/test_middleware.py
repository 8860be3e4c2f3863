"""Which hosts are answered, and how large and how slow a body may be."""

import contextlib
import select

import pytest
from fake_backend import MODEL, FakeBackend, one_model_app, post, served_model, serving

from quire.serve.middleware import LOOPBACK_HOSTS

PATH = "/v1/completions"
LIMIT = 2000
BODY = {"model": MODEL, "prompt": "hi"}


@pytest.fixture(scope="module")
def server():
    app = one_model_app(
        FakeBackend(),
        served_model(),
        allowed_hosts=[*LOOPBACK_HOSTS, "Mac.Example"],
        max_body_bytes=LIMIT,
        body_idle_timeout=0.2,
    )
    with serving(app) as server:
        yield server


HOSTS = [
    ("localhost", True),
    ("LOCALHOST:8000", True),
    ("localhost.:8000", True),
    ("127.0.0.1", True),
    ("127.0.0.1:8000", True),
    ("[::1]:8000", True),
    ("[::1]", True),
    ("quire.localhost:80", True),
    ("mac.example", True),
    ("evil.example", False),
    ("evil.example:8000", False),
    ("evillocalhost", False),
    ("localhost.evil.example", False),
    ("127.0.0.1.evil.example", False),
    ("[::2]", False),
    ("[::1", False),
    ("[::1].evil.example", False),
    ("localhost:80@evil.example", False),
    ("localhost:evil", False),
    ("", False),
    ("a/health?x=localhost", False),
]


@pytest.mark.parametrize(("host", "allowed"), HOSTS)
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nope"])
def test_only_known_hosts_are_answered(server, host, allowed, path):
    reply = server.request("GET", path, headers={"Host": host})
    if allowed:
        assert reply.status in (200, 404)
    else:
        assert reply.status == 403
        assert reply.error["code"] == "host_not_allowed"


def test_a_second_host_header_does_not_help(server):
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
    with server.connect(request) as connection:
        assert connection.recv(1 << 16).split()[1] in (b"400", b"403")


def test_any_host_is_answered_without_a_list():
    with serving(one_model_app(FakeBackend(), served_model())) as server:
        assert server.request("GET", "/health", headers={"Host": "evil.example"}).status == 200


@pytest.mark.parametrize("size", [LIMIT, LIMIT + 1, 100 * LIMIT])
def test_a_large_body_is_refused(server, size):
    body = b'{"model": "test/model", "prompt": "hi"}'
    reply = server.request("POST", PATH, body + b" " * (size - len(body)))
    assert reply.status == (200 if size <= LIMIT else 413)
    if size > LIMIT:
        assert str(LIMIT) in reply.error["message"]


def test_a_declared_size_is_refused_before_it_is_sent(server):
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {10**12}\r\n\r\n"
    with server.connect(head.encode()) as connection:
        reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert reply.startswith(b"HTTP/1.1 413")


def test_a_body_without_a_declared_size_is_counted(server):
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"3e8\r\n" + b" " * 1000 + b"\r\n"
    with server.connect(head.encode() + chunk * 3) as connection:
        reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert reply.startswith(b"HTTP/1.1 413")


def test_a_body_that_stops_arriving_is_given_up(server):
    with server.connect(post(PATH, BODY)[:-1]) as connection:
        reply = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert reply.startswith(b"HTTP/1.1 408")
    assert b'"invalid_request_error"' in reply


def test_a_body_that_drips_is_given_up():
    """Each byte is in time for the idle limit, so only the rate can end it."""
    app = one_model_app(FakeBackend(), served_model(), body_idle_timeout=0.3)
    request = post(PATH, {**BODY, "prompt": "x" * 5000})
    with serving(app) as server, server.connect(request[:200]) as connection:
        with contextlib.suppress(ConnectionError):
            for byte in request[200:]:
                connection.sendall(bytes([byte]))
                if select.select([connection], [], [], 0.02)[0]:
                    break
        reply = connection.recv(1 << 16)
    assert reply.startswith(b"HTTP/1.1 408")


def test_a_complete_body_may_be_answered_slowly():
    from fake_backend import Script

    script = Script(["hold", [0]])
    app = one_model_app(FakeBackend([script]), served_model(), body_idle_timeout=0.05)
    with serving(app) as server, server.connect(post(PATH, BODY)) as connection:
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        script.released = True
        connection.settimeout(20)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
