"""``quire serve`` whose log cannot be written: it starts, serves and replaces its worker."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_worker import CHATTER
from test_serve_command import SCRIPT, Server, free_port, model, until

__all__ = ["model"]  # a fixture


@contextlib.contextmanager
def serving_into(descriptor: int, model: Path, mode: str = "ok", *flags: str) -> Iterator[Server]:
    """The server with ``descriptor`` as its standard error."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, SCRIPT, mode, "--model", model, "--port", str(port), *flags],
        stdout=subprocess.DEVNULL,
        stderr=descriptor,
    )
    server = Server(process, port, Path("/dev/null"))

    def ready() -> bool:
        assert process.poll() is None, f"it left with {process.returncode}"
        with contextlib.suppress(ConnectionRefusedError):
            return server.get("/ready") == 200
        return False

    try:
        until(ready)
        yield server
    finally:
        process.kill()
        process.wait()


def metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as response:
        for line in response.read().decode().splitlines():
            if re.match(rf"quire_{name}_total[ {{]", line):
                return float(line.split()[1])
    raise AssertionError(f"there is no metric {name}")


def replace_worker(server: Server) -> None:
    restarts = metric(server, "worker_restarts")
    os.kill(server.worker_pid(), signal.SIGKILL)
    until(lambda: metric(server, "worker_restarts") == restarts + 1)
    until(lambda: server.get("/ready") == 200)
    with server.complete([65], max_tokens=2) as response:
        assert json.load(response)["usage"]["completion_tokens"] == 2


def leave(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0


def test_a_reader_that_ends_takes_no_worker_along(model):
    read_end, write_end = os.pipe()
    with serving_into(write_end, model) as server:
        os.close(write_end)
        os.close(read_end)
        replace_worker(server)
        replace_worker(server)
        assert metric(server, "log_lines_dropped") > 0
        leave(server)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_stops_neither_the_start_nor_a_restart(model):
    with open("/dev/full", "wb", buffering=0) as full, serving_into(full.fileno(), model) as server:
        replace_worker(server)
        assert metric(server, "log_lines_dropped") > 0
        leave(server)


def test_a_pipe_that_nobody_reads_stops_nothing(model):
    """Neither what the front end logs, one line a request, nor what the worker prints."""
    read_end, write_end = os.pipe()
    with serving_into(write_end, model) as server:
        os.close(write_end)
        for _ in range(3):
            with server.complete([CHATTER], max_tokens=2) as response:
                assert response.status == 200
        until(lambda: metric(server, "log_lines_dropped") > 0)
        assert server.get("/health") == 200
        replace_worker(server)
        leave(server)
        os.close(read_end)


def test_what_a_worker_prints_is_in_the_log_in_whole_lines(model):
    read_end, write_end = os.pipe()
    with serving_into(write_end, model, "talk") as server:
        os.close(write_end)
        with server.complete([65], max_tokens=3) as response:
            response.read()
        leave(server)
    with open(read_end, "rb") as file:
        lines = file.read().decode().splitlines()
    assert "words on standard output" in lines
    assert "words on standard error" in lines
