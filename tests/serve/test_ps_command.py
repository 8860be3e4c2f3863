"""`quire ps`: what a server says of itself, and what is said where there is none."""

from __future__ import annotations

import json
import socket

import pytest
from fake_backend import MODEL, FakeBackend, served_model, serving

from quire.serve import cli
from quire.serve.api_keys import ApiKey, Keyring, hash_key
from quire.serve.app import create_app
from quire.serve.metrics import Metrics
from quire.serve.registry import Registry, Served


@pytest.fixture(scope="module")
def server():
    backend = FakeBackend()
    registry = Registry([Served(served_model(), backend)])
    with serving(create_app(registry, Metrics())) as server:
        yield server


def test_the_state_of_a_server(server, capsys):
    assert cli.main(["ps", "--url", server.url]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line[:10].strip(): line[10:].strip() for line in lines}
    assert shown["server"].startswith(server.url)
    assert shown["models"] == MODEL
    assert shown["state"] == "not ready"  # the fake has no worker
    assert shown["requests"] == "0 running, 0 waiting"


def test_for_programs(server, capsys):
    assert cli.main(["ps", "--url", server.url + "/", "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert state["models"] == [MODEL]
    assert state["generated_tokens"] == 0
    assert state["loaded"] == {}  # the fake has no worker


def test_the_default_is_where_serve_listens(server, capsys, monkeypatch):
    monkeypatch.setenv("QUIRE_PORT", str(server.port))
    assert cli.main(["ps"]) == 0


def test_no_server_is_an_exit_code(capsys):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    assert cli.main(["ps", "--url", f"http://127.0.0.1:{port}"]) == 3
    assert capsys.readouterr().err.startswith("quire: no server answers at")


def test_a_key_is_asked_for(capsys):
    backend = FakeBackend()
    registry = Registry([Served(served_model(), backend)])
    keyring = Keyring({"a": ApiKey(sha256=hash_key("right"), name="a")})
    with serving(create_app(registry, Metrics(), keyring=keyring)) as server:
        assert cli.main(["ps", "--url", server.url]) == 1
    assert "asks for an API key" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "file:///etc/passwd"])
def test_only_http_is_asked(url, capsys):
    assert cli.main(["ps", "--url", url]) == 2
    assert "must begin with http" in capsys.readouterr().err
