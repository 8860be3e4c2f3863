"""``quire serve``: one or more models behind one OpenAI-compatible HTTP server."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Iterator

import uvicorn

from quire.engine.messages import Ready
from quire.serve import settings as settings_module
from quire.serve.api_keys import Keyring, make_keyring
from quire.serve.app import create_app
from quire.serve.body_helpers import BodyHelpers
from quire.serve.console import (
    LoadDisplay,
    configure_logging,
    print_ready,
    server_url,
    worker_output,
)
from quire.serve.daemon_thread import in_daemon_thread
from quire.serve.errors import ApiError
from quire.serve.fleet import Fleet
from quire.serve.http_protocol import (
    ConnectionGuard,
    HttpLimits,
    connections_within,
    raise_descriptor_limit,
)
from quire.serve.log_writer import LogWriter
from quire.serve.metrics import Metrics
from quire.serve.middleware import LOOPBACK_HOSTS
from quire.serve.model_files import DownloadFailed
from quire.serve.model_slot import WorkerEvents
from quire.serve.process_memory import share_one_heap
from quire.serve.registry import Registry, Served
from quire.serve.request_log import RefusalLog
from quire.serve.runtime_folder import remove_leftovers
from quire.serve.served_model import ModelFilesError
from quire.serve.settings import ServeSettings, SettingsError
from quire.serve.supervisor import StartupFailed
from quire.serve.tracing import Tracing, make_tracing

logger = logging.getLogger("quire.serve")

WORKER_COMMAND = (sys.executable, "-m", "quire.engine.worker")
# No new start can mend it: service managers are told not to try (deploy/).
PERMANENT = 2
# After the drain only the last bytes of finished answers are left to send.
FLUSH_TIMEOUT = 5  # seconds
LOG_FLUSH_TIMEOUT = 2.0  # seconds


class PortUnavailable(Exception):
    """The address cannot be listened on; the message is one line for the user."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    settings_module.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal.

    0 after a drain, 2 if it can never start like this, 1 if it cannot start now, 128 + signal when
    forced.
    """
    settings = settings_module.load(settings_module.flags_of(args), os.environ)
    share_one_heap()
    log = LogWriter()
    configure_logging(settings.log_level, log, settings.log_format)
    for line in settings_module.misspelt_variables(os.environ):
        logger.warning(line)
    try:
        return _serve(settings, log)
    except (
        PortUnavailable,
        DownloadFailed,
        ModelFilesError,
        SettingsError,
        StartupFailed,
    ) as error:
        if settings.log_format == "json":
            logger.critical("%s", error)
        else:
            log.write(f"quire: error: {error}")
        return PERMANENT if _is_permanent(error) else 1
    finally:
        log.flush(LOG_FLUSH_TIMEOUT)


def _is_permanent(error: Exception) -> bool:
    if isinstance(error, StartupFailed):
        return error.permanent
    return not isinstance(error, PortUnavailable | DownloadFailed)


def _serve(settings: ServeSettings, log: LogWriter) -> int:
    """Raises what :func:`run` shows as one line."""
    keyring = make_keyring(settings.api_key, settings.admin_key, settings.api_key_file)
    check_tls(settings.tls_cert_file, settings.tls_key_file)
    settings_module.check_models(settings)
    remove_leftovers()
    with bind(settings.host, settings.port) as listener:
        if keyring is None and not is_loopback(listener.getsockname()[0]):
            raise SettingsError(
                f"--host {settings.host} can be reached from other machines: requests need keys "
                "there. Give --api-key-file (see `quire keys`) or QUIRE_API_KEY"
            )
        tracing = make_tracing(settings.otlp_traces_endpoint, os.environ)
        server = ModelServer(settings, listener, log, keyring, tracing)
        # From here on a client waits for an answer instead of being refused.
        listen(listener)
        # What has been imported stays: every search for what only refers to itself would walk it.
        gc.freeze()
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
    hint = ""
    if error.errno == errno.EADDRNOTAVAIL:
        hint = " No network interface here has this address; choose another with --host."
    elif port:
        hint = " Choose another with --port."
    return f"Cannot listen on {host} port {port}: {error.strerror}.{hint}"


class _HTTPServer(uvicorn.Server):
    """Leaves signals alone: a drain comes before the HTTP server's own shutdown."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ModelServer:
    """The HTTP server and the models behind it."""

    def __init__(
        self,
        settings: ServeSettings,
        listener: socket.socket,
        log: LogWriter,
        keyring: Keyring | None,
        tracing: Tracing | None,
    ) -> None:
        """Raises :class:`SettingsError`."""
        self._settings = settings
        self._listener = listener
        self._display = LoadDisplay(log, settings.log_format)
        self._announced = False
        self._needs_key = keyring is not None
        self._tracing = tracing
        self._draining: asyncio.Task[None] | None = None
        self._forced_by = 0

        metrics = Metrics(log, vllm_names=settings.vllm_metrics)
        output = worker_output(log, settings.log_format)
        events = WorkerEvents(output, self._display.show, self._on_ready)
        self._fleet = Fleet(settings, WORKER_COMMAND, metrics, events)
        self._bodies = BodyHelpers()
        app = create_app(
            Registry(self._fleet.slots, settings.model_aliases),
            metrics,
            allowed_hosts=accepted_hosts(settings, listener.getsockname()[0]),
            max_body_bytes=settings.max_body_size,
            log_prompts=settings.log_prompts,
            keyring=keyring,
            allowed_origins=settings.allowed_origins,
            tracing=tracing,
            bodies=self._bodies,
        )
        refusals = RefusalLog()

        def refused(error: ApiError, client: str) -> None:
            metrics.refused_unread(error, client)
            refusals.refused(error, client)

        guard = ConnectionGuard(
            HttpLimits(max_connections=connections_within(raise_descriptor_limit())),
            refused,
        )
        self.http = _HTTPServer(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                http=guard.protocol(),
                ws="none",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                ssl_certfile=settings.tls_cert_file,
                ssl_keyfile=settings.tls_key_file,
                timeout_graceful_shutdown=FLUSH_TIMEOUT,
            )
        )

    async def serve(self) -> int:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._on_signal, signum)
        async with self._bodies:
            await self._serve()
        if self._forced_by:
            return 128 + self._forced_by
        logger.info("stopped")
        # Without a drain the HTTP server ended by itself.
        return 0 if self._draining is not None else 1

    async def _serve(self) -> None:
        serving = asyncio.create_task(self.http.serve([self._listener]))
        supervising = asyncio.create_task(self._fleet.run())
        try:
            await asyncio.wait({serving, supervising}, return_when=asyncio.FIRST_COMPLETED)
            self._fleet.stop()
            await supervising
        finally:
            self._display.close()
            self._fleet.kill()
            self.http.should_exit = True
            await serving
            if self._tracing is not None:
                # A collector that does not answer must not keep the server from ending.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(in_daemon_thread(self._tracing.close), FLUSH_TIMEOUT)

    def _on_ready(self, served: Served, info: Ready) -> None:
        self._display.close()
        logger.info(
            "%s is ready: %s on %s in %s, %d KV blocks of %d tokens, up to %d tokens a request",
            *(served.model.id, info.architecture, info.device, info.dtype),
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
            url = server_url(
                self._settings.host,
                self._listener.getsockname()[1],
                tls=self._settings.tls_cert_file is not None,
            )
            model = served.model
            if self._settings.log_format == "json":  # all that is printed is
                logger.info("Quire is serving %s at %s/v1", model.id, url)
                return
            print_ready(url, model.id, chat=model.chat_template is not None, key=self._needs_key)

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
            self._fleet.kill()

    async def _drain(self) -> None:
        try:
            await self._fleet.drain(self._settings.drain_timeout)
        finally:
            self._fleet.stop()


def accepted_hosts(settings: ServeSettings, address: str) -> tuple[str, ...] | None:
    """The Host headers to answer to; None for any.

    On a loopback ``address`` a foreign name can only come from a web page that rebound its own
    name to this machine. On any other the server's names are unknown until the user lists them.
    """
    hosts = settings.allowed_hosts
    if "*" in hosts:
        return None
    if is_loopback(address) or hosts:
        return (*LOOPBACK_HOSTS, *hosts)
    return None


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def check_tls(cert_file: str | None, key_file: str | None) -> None:
    """Raise :class:`SettingsError` where they are not a certificate and its key."""
    if cert_file is None and key_file is None:
        return
    if cert_file is None or key_file is None:
        raise SettingsError("HTTPS needs both --tls-cert-file and --tls-key-file")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or str(error)
        raise SettingsError(f"cannot use {cert_file} with {key_file}: {reason}") from error
