"""A real server for real clients: `quire serve` as a process, on a small random model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from quire.loadtest.model_folder import ModelShape

PATIENCE = 120  # seconds; only a broken server ever takes this long

SMALL = ModelShape(
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate=96,
    vocab=300,
    max_position=1024,
)


def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait until ``condition`` holds, and fail with ``what`` if it never does."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"gave up waiting until {what}"
        time.sleep(0.02)


_AT_WORK = "quire_requests_running", "quire_requests_waiting", 'quire_kv_blocks{state="used"}'


class Server:
    """One `quire serve` process; ``url`` is known once it listens."""

    def __init__(self, *flags: str, model: Path | None = None, script: Path | None = None) -> None:
        """``script`` stands in for the `quire` command."""
        program = ["-m", "quire.serve.cli"] if script is None else [str(script)]
        command = [sys.executable, *program, "serve", "--port", "0", *flags]
        if model is not None:
            command += ["--model", str(model)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.stdout = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = {k: v for k, v in os.environ.items() if not k.startswith("QUIRE_")}
        self.process = subprocess.Popen(
            command, stdout=self.stdout, stderr=self.log, stdin=subprocess.DEVNULL, env=environment
        )
        self.url = ""

    def wait_ready(self) -> Server:
        eventually(self._announced, f"the server is ready:\n{self.read(self.log)}")
        assert self.process.poll() is None, self.read(self.log)
        return self

    def _announced(self) -> bool:
        if self.process.poll() is not None:
            return True
        found = re.search(r"(http://\S+?)/v1", self.read(self.stdout))
        if found:
            self.url = found[1]
        return found is not None

    @staticmethod
    def read(file: object) -> str:
        os.lseek(file.fileno(), 0, os.SEEK_SET)  # type: ignore[attr-defined]
        return os.read(file.fileno(), 1 << 20).decode()  # type: ignore[attr-defined]

    def get(self, path: str) -> tuple[int, dict[str, str], str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as response:
                return response.status, dict(response.headers), response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers), error.read().decode()

    def post(self, path: str, body: dict[str, object]) -> tuple[int, dict[str, str], str]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return response.status, dict(response.headers), response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers), error.read().decode()

    def metrics(self) -> dict[str, float]:
        """Samples by name and labels; there is one model, whose name is left out."""
        lines = self.get("/metrics")[2].splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {_without_model(name): float(value) for name, value in pairs}

    def idle_metrics(self) -> dict[str, float]:
        """Waits for the worker's last report, which may come a moment after its last answer."""
        found: dict[str, float] = {}

        def is_idle() -> bool:
            found.update(self.metrics())
            return not any(found[name] for name in _AT_WORK)

        eventually(is_idle, f"no request has a place or blocks: {found}")
        return found

    def worker_pid(self) -> int:
        pids = workers(self.process.pid)
        assert len(pids) == 1, pids
        return pids[0]

    def stop(self) -> int:
        """SIGTERM, as a service manager would; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.log.close()
            self.stdout.close()


def _without_model(sample: str) -> str:
    return re.sub(r'model="[^"]*",?', "", sample).replace(",}", "}").replace("{}", "")


def workers(pid: int) -> list[int]:
    """The workers among a server's processes; it has helpers too."""
    output = subprocess.run(
        ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = (line.split(maxsplit=2) for line in output.splitlines())
    return [
        int(child) for child, parent, command in rows if int(parent) == pid and "worker" in command
    ]


def is_running(pid: int) -> bool:
    output = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
    ).stdout
    return bool(output.strip()) and not output.strip().startswith("Z")
