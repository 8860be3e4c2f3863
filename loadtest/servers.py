"""Server processes under comparison: how each is started, awaited and stopped."""

from __future__ import annotations

import asyncio
import ctypes
import ctypes.util
import importlib.resources
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from quire.loadtest.chat import ServerError, Target
from quire.loadtest.http import BaseURL
from quire.loadtest.results import ServerSetup
from quire.loadtest.serve import LoadOptions, find_target

_HOST = "127.0.0.1"
_POLL_SECONDS = 0.2
_STOP_SECONDS = 10.0
_LOG_TAIL = 2000  # bytes


class ServerSpec(msgspec.Struct, frozen=True):
    """A command that takes ``--host`` and ``--port`` and serves one model."""

    name: str
    command: tuple[str, ...]
    model: str | None = None  # the id to ask for; None asks the server
    preload: str | None = None  # LD_PRELOAD

    @property
    def setup(self) -> ServerSetup:
        """For the record: the interpreter's path says nothing about the server."""
        shown = ["python" if part == sys.executable else part for part in self.command]
        blas_core = os.environ.get("OPENBLAS_CORETYPE")
        return ServerSetup(self.name, shlex.join(shown), self.preload, blas_core)


def copy_demo(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """A copy of the demo model for each name, in ``folder``: a run may change its files."""
    folders = {name: folder / name for name in names}
    with importlib.resources.as_file(
        importlib.resources.files("quire.engine.demo") / "quire-demo"
    ) as source:
        for path in folders.values():
            shutil.copytree(source, path)
    return folders


def quire_spec(
    model: Path, clients: int, extra: Sequence[str] = (), preload: str | None = None
) -> ServerSpec:
    command = [sys.executable, "-m", "quire.serve.cli", "serve", "--model", str(model)]
    command += ["--max-num-seqs", str(max(64, clients)), "--log-level", "warning"]
    command += ["--chat-template-kwargs", "enable_thinking=false", *extra]
    return ServerSpec("quire", tuple(command), preload=preload)


def mlx_lm_spec(
    model: Path, clients: int, extra: Sequence[str] = (), preload: str | None = None
) -> ServerSpec:
    """mlx_lm.server set up for this load: every client decodes at once and keeps a cache."""
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model)]
    command += ["--decode-concurrency", str(max(32, clients))]
    command += ["--prompt-concurrency", str(max(8, clients))]
    command += ["--prompt-cache-size", str(max(10, 2 * clients))]
    # Unless told, it lets a model think that can, whatever the template's own default, and so would
    # be asked something else than Quire. Thoughts are told apart in other ways, too.
    command += ["--chat-template-args", '{"enable_thinking": false}']
    command += ["--log-level", "WARNING", *extra]
    return ServerSpec("mlx_lm", tuple(command), model="default_model", preload=preload)


def find_openblas() -> str | None:
    """The name under which the dynamic linker finds OpenBLAS on Linux; None elsewhere.

    The reference BLAS inside MLX's Linux CPU wheel is tens of times slower, so both servers get
    this one through LD_PRELOAD.
    """
    if not sys.platform.startswith("linux"):
        return None
    for name in (ctypes.util.find_library("openblas"), "libopenblas.so.0"):
        if name is not None:
            with suppress(OSError):
                ctypes.CDLL(name)
                return name
    return None


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((_HOST, 0))
        port: int = sock.getsockname()[1]
        return port


def _environment(preload: str | None) -> Mapping[str, str]:
    if preload is None:
        return os.environ
    present = os.environ.get("LD_PRELOAD")
    return {**os.environ, "LD_PRELOAD": f"{preload}:{present}" if present else preload}


class ServerProcess:
    """A running server, in a process group of its own so that its workers end with it."""

    def __init__(self, spec: ServerSpec, log: Path | None = None) -> None:
        """What the server prints goes to ``log``, or to a file that is gone in the end."""
        self.spec = spec
        port = _free_port()
        self.base = BaseURL(_HOST, port, "", tls=False)
        # Closed by stop().
        self._log = log.open("w+b") if log else tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [*spec.command, "--host", _HOST, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=_environment(spec.preload),
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait_exit(self, seconds: float) -> None:
        """Return once the process has ended, or after ``seconds``."""
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._process.wait, seconds)

    def exit_message(self) -> str | None:
        """None while the process runs; else its exit code and the end of its output."""
        code = self._process.poll()
        if code is None:
            return None
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _LOG_TAIL))
        lines = self._log.read().decode("utf-8", "replace").split("\n")
        said = " | ".join(line.strip() for line in lines[-4:] if line.strip())
        return f"{self.spec.name} exited with code {code}: {said or '(no output)'}"

    async def wait_ready(
        self, options: LoadOptions, ready_seconds: float
    ) -> tuple[Target, str | None]:
        """Wait for the first answered request. Raises :class:`ServerError` if none comes."""
        deadline = time.monotonic() + ready_seconds
        while True:
            try:
                return await find_target(self.base, self.spec.model, options)
            except ServerError as error:
                if (message := self.exit_message()) is not None:
                    raise ServerError(message) from None
                if not error.retryable:
                    raise
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"{self.spec.name} not ready in {ready_seconds:g} s: {error}"
                    ) from None
            await asyncio.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """Terminate the group, then kill what is left of it."""
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        # macOS answers EPERM for a group whose only member is a zombie.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


@contextmanager
def running(spec: ServerSpec, log: Path | None = None) -> Iterator[ServerProcess]:
    """Start a server for the block; it is stopped however the block ends."""
    server = ServerProcess(spec, log)
    try:
        yield server
    finally:
        server.stop()
