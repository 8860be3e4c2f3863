"""A helper process: does one kind of job for the front end, and may be killed at any moment.

Started by :mod:`quire.serve.helpers`. Frames come in on standard input and go out on standard
output. One that comes in is two lengths (4 bytes each, big-endian), a JSON value and bytes that go
with the value; one that goes out is a length and a JSON value:

    in    {"target": "package.module:function", "config": .., "memory": bytes, "seconds": ..}
    out   ["ready", null] once ``function(config)`` has returned the handler of jobs
    in    a request
    out   ["done", handler(request)] | ["refused", details] | ["memory", null] | ["failed", reason]

Where bytes came with the request they are the handler's second argument.
"""

from __future__ import annotations

import importlib
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

LENGTH_BYTES: Final = 4
# A replied frame of more is a failed job: the front end would have to hold it.
MAX_REPLY_BYTES: Final = 64 << 20

Handler = Callable[..., Any]

logger = logging.getLogger("quire.helper")


class Refused(Exception):
    """Raised by a handler whose answer is no; ``details`` goes to the caller as it is."""

    def __init__(self, details: Any) -> None:
        super().__init__(details)
        self.details = details


class Setup(msgspec.Struct, frozen=True):
    target: str  # "package.module:function"; the function makes the handler
    config: Any
    memory: int  # bytes a job may take beside what the helper holds when it is ready
    seconds: float  # of wall time for one job
    limit_address_space: bool


def read_frame(stream: BinaryIO) -> tuple[bytes, bytes] | None:
    """The next request as JSON and the bytes beside it, or None once the other side has closed."""
    head = stream.read(2 * LENGTH_BYTES)
    if len(head) < 2 * LENGTH_BYTES:
        return None
    size = int.from_bytes(head[:LENGTH_BYTES], "big")
    extra = int.from_bytes(head[LENGTH_BYTES:], "big")
    frame, payload = stream.read(size), stream.read(extra)
    return (frame, payload) if len(frame) == size and len(payload) == extra else None


def pack_request(value: Any, payload_bytes: int = 0) -> bytes:
    """All of a request's frame but the payload, which follows."""
    body = msgspec.json.encode(value)
    sizes = (len(body), payload_bytes)
    return b"".join([*(size.to_bytes(LENGTH_BYTES, "big") for size in sizes), body])


def pack_reply(value: Any) -> bytes:
    body = msgspec.json.encode(value)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def _load(setup: Setup) -> Handler:
    module, _, name = setup.target.partition(":")
    make: Callable[[Any], Handler] = getattr(importlib.import_module(module), name)
    return make(setup.config)


def _limit_memory(extra: int) -> None:
    """Let this process map ``extra`` bytes more than now; what asks for more fails (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _answer(handler: Handler, frame: bytes, payload: bytes) -> bytes:
    extra = [payload] if payload else []
    try:
        reply = pack_reply(["done", handler(msgspec.json.decode(frame), *extra)])
    except Refused as refused:
        return pack_reply(["refused", refused.details])
    except MemoryError:
        return pack_reply(["memory", None])
    except Exception as error:
        logger.exception("A helper's job failed")
        return pack_reply(["failed", f"{type(error).__name__}: {error}"[:500]])
    if len(reply) > MAX_REPLY_BYTES:
        return pack_reply(["memory", None])
    return reply


def main() -> int:
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    # Whatever prints must not end up between two frames.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    frame = read_frame(requests)
    if frame is None:
        return 0
    setup = msgspec.json.decode(frame[0], type=Setup)
    try:
        handler = _load(setup)
    except Exception as error:
        replies.write(pack_reply(["failed", f"{type(error).__name__}: {error}"[:500]]))
        return 1
    if setup.limit_address_space:
        _limit_memory(setup.memory)
    replies.write(pack_reply(["ready", None]))
    while (frame := read_frame(requests)) is not None:
        # The front end ends a job that takes too long; where the front end is gone, the kernel does
        # (the signal is not handled here, so that nothing the job does can hold it up).
        signal.setitimer(signal.ITIMER_REAL, 2 * setup.seconds + 1)
        reply = _answer(handler, *frame)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(reply)
        del frame, reply  # large ones are not kept until the next
    return 0
