from __future__ import annotations

import asyncio
import contextlib
import re
import time

import msgspec
import pytest
from fake_chat_server import (
    CHUNKED_HEAD,
    DONE,
    SSE_HEAD,
    Answer,
    Request,
    as_chunks,
    complete_answer,
    delta,
    event,
    respond,
    sends,
    serving,
    usage,
)

from quire.loadtest.chat import (
    ServerError,
    Target,
    error_message,
    find_model,
    probe,
    stream_chat,
)
from quire.loadtest.http import BaseURL
from quire.loadtest.records import RequestRecord

HELLO = [{"role": "user", "content": "hello"}]
EVENTS = delta("", role="assistant") + delta("a") + delta("b") + delta(finish="length")


def _record() -> RequestRecord:
    return RequestRecord(index=0, client=0, turn=0, prompt_chars=5, max_tokens=2, chunk_ms=[])


async def _chat(answer: Answer, **options: object) -> tuple[str, RequestRecord]:
    record = _record()
    async with serving(answer) as server:
        target = msgspec.structs.replace(Target(server.base, "fake"), **options)
        text = (await stream_chat(target, HELLO, record, time.perf_counter())).text
    return text, record


@pytest.mark.parametrize("piece", [None, 1])
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_a_streamed_answer_split_anywhere(chunk: int, piece: int | None) -> None:
    body = b": keepalive\n\n" + EVENTS + usage(10, 2, 4) + DONE
    text, record = asyncio.run(_chat(sends(CHUNKED_HEAD + as_chunks(body, chunk), piece)))
    assert text == "ab"
    assert record.error is None
    assert len(record.chunk_ms) == 2  # neither the role nor the finish reason is a token
    assert 0 <= record.chunk_ms[0] <= record.chunk_ms[1] <= record.end_ms
    assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (10, 2, 4)
    assert record.finish_reason == "length"


def test_an_http_1_0_stream_without_usage() -> None:
    head = SSE_HEAD.replace(b"1.1", b"1.0") + b"\r\n"
    text, record = asyncio.run(_chat(sends(head + EVENTS + DONE)))
    assert (text, record.error, record.completion_tokens) == ("ab", None, None)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_counts_as_text(field: str) -> None:
    body = delta(**{field: "hm"}) + delta("a") + DONE
    text, record = asyncio.run(_chat(sends(CHUNKED_HEAD + as_chunks(body, 99))))
    assert text == "hma"
    assert len(record.chunk_ms) == 2


def test_equal_answers_have_equal_digests() -> None:
    digests = [
        asyncio.run(_chat(sends(complete_answer(text))))[1].answer_digest
        for text in ("ab", "ab", "ac")
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("answer", "kind", "status", "message"),
    [
        (respond(503, {"error": {"message": "loading"}}), "http", 503, "loading"),
        (respond(404, {"error": "no model"}), "http", 404, "no model"),
        (
            CHUNKED_HEAD + as_chunks(delta("a") + event({"error": {"message": "died"}}), 99),
            "stream",
            None,
            "died",
        ),
        (CHUNKED_HEAD + as_chunks(EVENTS, 99)[:-9], "truncated", None, "inside the body"),
        (CHUNKED_HEAD + as_chunks(EVENTS, 99), "truncated", None, r"without \[DONE\]"),
        (CHUNKED_HEAD + as_chunks(b"data: {oops\n\n", 99), "protocol", None, "malformed"),
        (CHUNKED_HEAD + b"zz\r\n", "protocol", None, "chunk size"),
        (b"SSH-2.0\r\n\r\n", "protocol", None, "not an HTTP/1 response"),
    ],
)
def test_failures_are_recorded_by_kind(
    answer: bytes, kind: str, status: int | None, message: str
) -> None:
    _, record = asyncio.run(_chat(sends(answer)))
    assert record.error is not None
    assert (record.error.kind, record.error.status) == (kind, status)
    assert re.search(message, record.error.message)
    assert record.answer_digest is None
    assert record.end_ms > 0


def test_a_cut_stream_keeps_what_had_arrived() -> None:
    _, record = asyncio.run(_chat(sends(CHUNKED_HEAD + as_chunks(EVENTS, 10_000)[:-5])))
    assert record.error is not None
    assert len(record.chunk_ms) == 2


def test_a_silent_server_times_out() -> None:
    async def silent(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED_HEAD)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

    _, record = asyncio.run(_chat(silent, timeout=0.05))
    assert record.error is not None
    assert record.error.kind == "timeout"


def test_a_closed_port_is_a_connect_error(closed_port: int) -> None:
    record = _record()
    target = Target(BaseURL("127.0.0.1", closed_port, "", False), "fake")
    asyncio.run(stream_chat(target, HELLO, record, time.perf_counter()))
    assert record.error is not None
    assert record.error.kind == "connect"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too\\n long", "type": "x"}}', "too long"),
        (b'{"error": "plain"}', "plain"),
        (b'{"detail": [{"loc": 1}]}', '[{"loc":1}]'),
        (b"Not Found", "Not Found"),
        (b"\xff", "\N{REPLACEMENT CHARACTER}"),
        (b"", "(empty body)"),
    ],
)
def test_error_messages(body: bytes, message: str) -> None:
    assert error_message(body) == message


async def _find(models: bytes) -> str:
    async with serving(sends(b""), models) as server:
        return await find_model(server.base, {})


@pytest.mark.parametrize(
    ("models", "expected"),
    [
        (respond(200, {"data": [{"id": "one", "object": "model"}]}), "one"),
        (respond(200, {"data": []}), "default_model"),
        (respond(500, b"no cache"), "default_model"),
        (respond(200, b"<html>"), "default_model"),
        (b"\r", "default_model"),
    ],
    ids=["one", "empty", "500", "not-json", "cut"],
)
def test_the_model_is_asked_from_the_server(models: bytes, expected: str) -> None:
    assert asyncio.run(_find(models)) == expected


def test_several_models_are_not_guessed_at() -> None:
    with pytest.raises(ServerError, match=r"choose with --model.*'a', 'b'"):
        asyncio.run(_find(respond(200, {"data": [{"id": "a"}, {"id": "b"}]})))


def test_the_request_asks_for_what_was_chosen() -> None:
    async def ask(**options: object) -> dict[str, object]:
        async with serving(sends(complete_answer())) as server:
            target = msgspec.structs.replace(Target(server.base, "m"), **options)
            await stream_chat(target, HELLO, _record(), 0.0)
            return server.requests[0].body

    body = asyncio.run(ask())
    assert body == {
        "model": "m",
        "messages": HELLO,
        "max_tokens": 2,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert asyncio.run(ask(ignore_eos=True, temperature=0.5)) == {
        **body,
        "ignore_eos": True,
        "temperature": 0.5,
    }


def test_stream_options_are_left_out_where_refused() -> None:
    async def picky(request: Request, writer: asyncio.StreamWriter) -> None:
        refused = "stream_options" in request.body
        error = {"error": {"message": "unknown field stream_options"}}
        writer.write(respond(400, error) if refused else complete_answer())

    async def ask() -> Target:
        async with serving(picky) as server:
            return (await probe(Target(server.base, "m")))[0]

    assert asyncio.run(ask()).include_usage is False


@pytest.mark.parametrize(("status", "retryable"), [(503, True), (404, False)])
def test_a_server_that_answers_no_request_is_refused(status: int, retryable: bool) -> None:
    async def ask() -> None:
        async with serving(sends(respond(status, {"error": "why not"}))) as server:
            await probe(Target(server.base, "m"))

    with pytest.raises(ServerError, match=f"{status}.*why not") as caught:
        asyncio.run(ask())
    assert caught.value.retryable is retryable


def test_the_server_header_and_the_key_travel() -> None:
    async def ask() -> tuple[dict[str, str], str]:
        async with serving(sends(complete_answer())) as server:
            target = Target(server.base, "m", headers={"Authorization": "Bearer k"})
            _, headers = await probe(target)
            return headers, server.requests[0].headers["authorization"]

    headers, key = asyncio.run(ask())
    assert headers["server"] == "fake/1"
    assert key.lower() == "bearer k"
