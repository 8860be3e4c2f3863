"""What ``quire serve`` shows the person who starts it, and the format of its log."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from quire.engine.messages import LoadProgress
from quire.serve.log_writer import LogWriter, discard_output

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class _OneLineFormatter(logging.Formatter):
    """One line per record; what a client sent cannot forge a second one."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")


class _JsonFormatter(logging.Formatter):
    """One JSON object per record. ``fields`` of a record come in place of its message."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
        }
        fields = getattr(record, "fields", None)
        line |= {"message": record.getMessage()} if fields is None else fields
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _LogHandler(logging.Handler):
    def __init__(self, log: LogWriter) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._log.write(self.format(record))
        except Exception:  # a record that cannot be formatted
            self.handleError(record)


def configure_logging(level: str, log: LogWriter, format: Literal["text", "json"] = "text") -> None:
    """Send all records of ``level`` and above to ``log``."""
    handler = _LogHandler(log)
    line = "%(asctime)s.%(msecs)03d %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(_JsonFormatter() if format == "json" else _OneLineFormatter(line, "%F %T"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # These are for the people who work on the libraries.
    for name in ("asyncio", "uvicorn", "httpx", "httpx2", "httpcore", "filelock"):
        logging.getLogger(name).setLevel(
            logging.DEBUG if level == "debug" and name == "uvicorn" else logging.WARNING
        )


def worker_output(log: LogWriter, format: Literal["text", "json"]) -> Callable[[str], None]:
    """Takes the lines that a worker prints, which have a time and a level of their own."""
    if format == "text":
        return log.write
    worker = logging.getLogger("quire.worker")
    return lambda line: worker.info("%s", line)


class LoadDisplay:
    """Progress of a load on standard error: a bar on a terminal, else one line per stage."""

    def __init__(self, log: LogWriter, format: Literal["text", "json"] = "text") -> None:
        self._log = log
        self._is_json = format == "json"
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""

    def show(self, progress: LoadProgress) -> None:
        if self._is_json or not os.isatty(self._log.descriptor):
            if progress.stage != self._stage:
                self._stage = progress.stage
                if self._is_json:
                    logging.getLogger("quire.serve").info("%s", progress.stage)
                else:
                    self._log.write(f"{progress.stage}...")
            return
        with contextlib.suppress(OSError):  # a terminal that has gone
            self._show_bar(progress)

    def close(self) -> None:
        if self._progress is not None:
            with contextlib.suppress(OSError):
                self._progress.stop()
            self._progress = self._task = None

    def _show_bar(self, progress: LoadProgress) -> None:
        if self._progress is None or self._task is None:
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task("")
            self._progress.start()
        self._progress.update(
            self._task,
            description=progress.stage,
            completed=progress.done,
            total=progress.total or None,
        )


def server_url(host: str, port: int, *, tls: bool = False) -> str:
    """Where a client on this machine reaches a server bound to ``host``."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{host}:{port}"


def print_ready(url: str, model_name: str, *, chat: bool, key: bool = False) -> None:
    """Announce the server on standard output, with a request to paste into a shell."""
    body: dict[str, object] = {"model": model_name}
    if chat:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": "Hello!"}]
    else:
        path = "/v1/completions"
        body |= {"prompt": "Hello", "max_tokens": 32}
    auth = '-H "Authorization: Bearer $QUIRE_API_KEY" ' if key else ""
    data = json.dumps(body).replace("'", "'\\''")
    try:
        print(
            f"Quire is serving {model_name} at {url}/v1\n\n"
            f"curl {url}{path} {auth}-H 'Content-Type: application/json' -d '{data}'\n",
            flush=True,
        )
    except OSError:
        discard_output()
