"""Framing, errors after the first byte, pings, and what happens when nobody listens."""

import asyncio

import msgspec
import pytest
from starlette.types import Message

from quire.serve import sse
from quire.serve.backend import GenerationFailed


class Payload(msgspec.Struct):
    text: str


async def events(*items: bytes | Exception):
    for item in items:
        if isinstance(item, Exception):
            raise item
        yield item


def send_all(source) -> tuple[list[Message], int]:
    """Everything the response sends to a client that stays, and how often it was closed."""
    sent: list[Message] = []
    closed = []

    async def main() -> None:
        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

        async def send(message: Message) -> None:
            sent.append(message)

        response = sse.EventStream(source, close=lambda: closed.append(1))
        await response({"type": "http", "method": "POST"}, receive, send)

    asyncio.run(main())
    return sent, len(closed)


def body(sent: list[Message]) -> bytes:
    return b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\x85", "\u2028", "\u2029", "\x0b", "\x1c"])
def test_an_event_is_one_line_to_every_client(separator):
    data = sse.event(Payload(f"a{separator}é"))
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    assert len(data.decode().splitlines()) == 2
    assert msgspec.json.decode(data[6:]) == {"text": f"a{separator}é"}


def test_headers_and_body():
    sent, closed = send_all(events(b"data: 1\n\n", sse.DONE))
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"cache-control"] == b"no-cache, no-transform"
    assert headers[b"x-accel-buffering"] == b"no"
    assert body(sent) == b"data: 1\n\ndata: [DONE]\n\n"
    assert closed == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GenerationFailed("The worker died."), "The worker died."),
        (RuntimeError("secret"), "The server failed to answer this request; its log says why."),
    ],
)
def test_a_failure_after_the_first_byte_is_the_last_event(error, message):
    sent, closed = send_all(events(b"data: 1\n\n", error))
    first, last, rest = body(sent).split(b"\n\n")
    assert (first, rest) == (b"data: 1", b"")
    detail = msgspec.json.decode(last.removeprefix(b"data: "))["error"]
    assert detail["message"] == message
    assert detail["type"] == "server_error"
    assert set(detail) == {"message", "type", "param", "code"}
    assert closed == 1


def test_a_silent_stream_is_kept_alive(monkeypatch):
    monkeypatch.setattr(sse, "PING_INTERVAL", 0.01)

    async def slow():
        await asyncio.sleep(0.1)
        yield sse.DONE

    sent, _ = send_all(slow())
    assert body(sent).startswith(b": ping\n\n")
    assert body(sent).replace(b": ping\n\n", b"") == sse.DONE


def test_a_client_that_left_before_the_first_event_is_noticed():
    closed = []
    started = []

    async def never():
        started.append(1)
        yield b""

    async def main() -> None:
        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            await asyncio.Event().wait()

        response = sse.EventStream(never(), close=lambda: closed.append(1))
        await response({"type": "http", "method": "POST"}, receive, send)

    asyncio.run(main())
    assert closed == [1]
    assert started == []
