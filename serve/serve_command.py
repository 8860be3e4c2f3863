"""``quire serve``: one model behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence

import uvicorn

from quire.engine.messages import Ready, WorkerConfig
from quire.serve import settings as settings_module
from quire.serve.app import create_app
from quire.serve.console import (
    LoadDisplay,
    configure_logging,
    print_ready,
    server_url,
)
from quire.serve.http_protocol import (
    ConnectionGuard,
    HttpLimits,
    connections_within,
    raise_descriptor_limit,
)
from quire.serve.log_writer import LogWriter
from quire.serve.metrics import Metrics
from quire.serve.middleware import LOOPBACK_HOSTS
from quire.serve.model_files import resolve_model
from quire.serve.registry import Registry, Served
from quire.serve.served_model import ModelFilesError, ServedModel, load_served_model
from quire.serve.settings import ServeSettings
from quire.serve.supervisor import StartupFailed, Supervisor
from quire.serve.worker_client import WorkerClient

logger = logging.getLogger("quire.serve")

WORKER_COMMAND = (sys.executable, "-m", "quire.engine.worker")
# After the drain only the last bytes of finished answers are left to send.
FLUSH_TIMEOUT = 5  # seconds
LOG_FLUSH_TIMEOUT = 2.0  # seconds


class PortUnavailable(Exception):
    """The address cannot be listened on; the message is one line for the user."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    settings_module.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal; 0 after a drain, 1 if it cannot start, 128 + signal when forced."""
    settings = settings_module.load(settings_module.flags_of(args), os.environ)
    log = LogWriter()
    configure_logging(settings.log_level, log)
    for line in settings_module.misspelt_variables(os.environ):
        logger.warning(line)
    try:
        return _serve(settings, log)
    except (ModelFilesError, PortUnavailable, StartupFailed) as error:
        log.write(f"quire: error: {error}")
        return 1
    finally:
        log.flush(LOG_FLUSH_TIMEOUT)


def _serve(settings: ServeSettings, log: LogWriter) -> int:
    """Raises what :func:`run` shows as one line."""
    with bind(settings.host, settings.port) as listener:
        files = resolve_model(settings.model)
        name = settings.served_model_name or files.name
        model = load_served_model(
            files.path,
            name,
            tool_parser=settings.tool_parser,
            reasoning_parser=settings.reasoning_parser,
            default_switches=dict(settings.chat_template_kwargs),
        )
        # From here on a client waits for an answer instead of being refused.
        listen(listener)
        server = ModelServer(settings, str(files.path), model, listener, log)
        with asyncio.Runner(loop_factory=server.http.config.get_loop_factory()) as runner:
            return runner.run(server.serve())


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises :class:`PortUnavailable`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise PortUnavailable(f"Cannot listen on {host}: {error.strerror}.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise PortUnavailable(_why_not(host, port, error)) from error
    return listener


def listen(listener: socket.socket) -> None:
    """Raises :class:`PortUnavailable` if another process began to listen since :func:`bind`."""
    try:
        listener.listen(2048)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise PortUnavailable(_why_not(host, port, error)) from error


def _why_not(host: str, port: int, error: OSError) -> str:
    hint = " Choose another with --port." if port else ""
    return f"Cannot listen on {host} port {port}: {error.strerror}.{hint}"


class _HTTPServer(uvicorn.Server):
    """Leaves signals alone: a drain comes before the HTTP server's own shutdown."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ModelServer:
    """The HTTP server and the supervised worker behind it."""

    def __init__(
        self,
        settings: ServeSettings,
        model_path: str,
        model: ServedModel,
        listener: socket.socket,
        log: LogWriter,
    ) -> None:
        self._settings = settings
        self._model = model
        self._listener = listener
        self._display = LoadDisplay(log)
        self._announced = False
        self._draining: asyncio.Task[None] | None = None
        self._forced_by = 0

        metrics = Metrics(log)
        client = WorkerClient(metrics, settings.max_num_seqs + settings.max_queue)
        app = create_app(
            Registry([Served(model, client)], settings.model_aliases),
            metrics,
            allowed_hosts=accepted_hosts(settings, listener.getsockname()[0]),
            max_body_bytes=settings.max_body_size,
        )
        guard = ConnectionGuard(
            HttpLimits(max_connections=connections_within(raise_descriptor_limit())),
            metrics.refused_unread,
        )
        self.http = _HTTPServer(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                http=guard.protocol(),
                ws="none",
                access_log=settings.log_level == "debug",
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=FLUSH_TIMEOUT,
            )
        )
        self._supervisor = Supervisor(
            client,
            worker_config(settings, model_path, model.eos_token_ids),
            WORKER_COMMAND,
            on_output=log.write,
            on_progress=self._display.show,
            on_ready=self._on_ready,
        )

    async def serve(self) -> int:
        async with self._model.helpers():
            return await self._serve()

    async def _serve(self) -> int:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_signal, signum)
        serving = asyncio.create_task(self.http.serve([self._listener]))
        supervising = asyncio.create_task(self._supervisor.run())
        try:
            await asyncio.wait({serving, supervising}, return_when=asyncio.FIRST_COMPLETED)
            self._supervisor.stop()
            await supervising
        finally:
            self._display.close()
            self._supervisor.kill()
            self.http.should_exit = True
            await serving
        if self._forced_by:
            return 128 + self._forced_by
        logger.info("stopped")
        # Without a drain the HTTP server ended by itself.
        return 0 if self._draining is not None else 1

    def _on_ready(self, info: Ready) -> None:
        self._display.close()
        logger.info(
            "worker ready: %s on %s in %s, %d KV blocks of %d tokens, up to %d tokens a request",
            *(info.architecture, info.device, info.dtype),
            *(info.num_blocks, info.block_size, info.max_model_len),
        )
        if (limits := info.limits) is not None:
            logger.info(
                "worker memory in MiB: %d weights, %d KV cache, %d for a step; limit %d of %d",
                *(info.weight_bytes >> 20, info.kv_cache_bytes >> 20, limits.activations >> 20),
                *(limits.limit >> 20, limits.usable >> 20),
            )
        for note in info.notes:
            logger.info("worker: %s", note)
        if not self._announced:
            self._announced = True
            url = server_url(self._settings.host, self._listener.getsockname()[1])
            print_ready(url, self._model.id, chat=self._model.chat_template is not None)

    def _on_signal(self, signum: int) -> None:
        if self._draining is None:
            logger.info(
                "%s: finishing running requests for up to %g s; a second signal stops at once",
                signal.Signals(signum).name,
                self._settings.drain_timeout,
            )
            self._draining = asyncio.create_task(self._drain())
        else:
            self._forced_by = signum
            self.http.force_exit = True
            self._draining.cancel()
            self._supervisor.kill()

    async def _drain(self) -> None:
        try:
            await self._supervisor.drain(self._settings.drain_timeout)
        finally:
            self._supervisor.stop()


def accepted_hosts(settings: ServeSettings, address: str) -> tuple[str, ...] | None:
    """The Host headers to answer to; None for any.

    On a loopback ``address`` a foreign name can only come from a web page that rebound its own
    name to this machine. On any other the server's names are unknown until the user lists them.
    """
    hosts = settings.allowed_hosts
    if "*" in hosts:
        return None
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback or hosts:
        return (*LOOPBACK_HOSTS, *hosts)
    logger.warning("listening on %s: every machine that reaches it can use the model", address)
    return None


def worker_config(
    settings: ServeSettings, model_path: str, eos_token_ids: Sequence[int]
) -> WorkerConfig:
    """The addresses are filled in for each worker by the supervisor."""
    return WorkerConfig(
        model_path=model_path,
        request_address="",
        output_address="",
        device=settings.device,
        block_size=settings.block_size,
        kv_cache_memory=settings.kv_cache_memory,
        memory_fraction=settings.memory_fraction,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        eviction_policy=settings.eviction_policy,
        log_level=settings.log_level,
        eos_token_ids=list(eos_token_ids),
    )
