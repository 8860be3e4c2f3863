from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from fake_chat_server import as_chunks, sends, serving
from hypothesis import given
from hypothesis import strategies as st

from quire.loadtest.http import (
    BaseURL,
    ChunkedDecoder,
    EventParser,
    ProtocolError,
    Truncated,
    send,
)


def _cuts(data: bytes, points: list[int]) -> list[bytes]:
    edges = [0, *sorted(p % (len(data) + 1) for p in points), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@given(st.binary(max_size=200), st.integers(1, 64), st.lists(st.integers(0, 5000)))
def test_chunked_content_survives_any_split(content: bytes, size: int, points: list[int]) -> None:
    decoder = ChunkedDecoder()
    pieces = _cuts(as_chunks(content, size), points)
    assert b"".join(decoder.feed(piece) for piece in pieces) == content
    assert decoder.complete


def test_chunk_extensions_and_trailers_are_skipped() -> None:
    decoder = ChunkedDecoder()
    assert decoder.feed(b"3;name=x\r\nabc\r\n0\r\nTrailer: 1\r\n") == b"abc"
    assert not decoder.complete
    assert decoder.feed(b"\r\n") == b""
    assert decoder.complete


@pytest.mark.parametrize("data", [b"xyz\r\n", b"-1\r\n", b"0x3\r\n", b"\r\n", b"1\r\nabc\r\n"])
def test_malformed_chunks_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        ChunkedDecoder().feed(data)


def test_an_endless_chunk_header_is_refused() -> None:
    decoder = ChunkedDecoder()
    decoder.feed(b"1" * 700_000)
    with pytest.raises(ProtocolError, match="too long"):
        decoder.feed(b"1" * 700_000)


@given(st.lists(st.integers(0, 500)), st.sampled_from([b"\n", b"\r\n"]))
def test_events_survive_any_split(points: list[int], newline: bytes) -> None:
    lines = [
        b": keepalive 3/7",
        b"",
        b'data: {"a": 1}',
        b"",
        b"event: x",
        b"id: 7",
        b"data:one",
        b"data: two",
        b"",
        b"",
        b"data: [DONE]",
        b"",
    ]
    parser = EventParser()
    pieces = _cuts(newline.join(lines) + newline, points)
    events = [event for piece in pieces for event in parser.feed(piece)]
    assert events == [b'{"a": 1}', b"one\ntwo", b"[DONE]"]


def test_an_unfinished_event_is_not_given_out() -> None:
    assert EventParser().feed(b"data: half\n") == []


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", BaseURL("127.0.0.1", 8000, "", False)),
        ("http://host/", BaseURL("host", 80, "", False)),
        ("https://host/api/v1", BaseURL("host", 443, "/api", True)),
        ("http://[::1]:9/v1/", BaseURL("::1", 9, "", False)),
    ],
)
def test_urls(url: str, expected: BaseURL) -> None:
    assert BaseURL.parse(url) == expected


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://"])
def test_a_bad_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="--url must look like"):
        BaseURL.parse(url)


async def _get(data: bytes, piece: int | None = None) -> tuple[int, bytes]:
    async with serving(sends(data, piece)) as server, send(server.base, "GET", "/") as response:
        return response.status, await response.read()


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody",
        b"HTTP/1.0 200 OK\r\n\r\nbody",
        b"HTTP/1.1 200\r\nTransfer-Encoding: Chunked\r\n\r\n1\r\nb\r\n3\r\nody\r\n0\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody",
    ],
    ids=["length", "until-close", "chunked", "interim"],
)
@pytest.mark.parametrize("piece", [None, 1])
def test_bodies(data: bytes, piece: int | None) -> None:
    assert asyncio.run(_get(data, piece)) == (200, b"body")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nbody",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n",
    ],
    ids=["nothing", "head", "length", "chunked"],
)
def test_a_connection_that_ends_early_is_truncated(data: bytes) -> None:
    with pytest.raises(Truncated):
        asyncio.run(_get(data or b"\r"))


@pytest.mark.parametrize(
    "data", [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"]
)
def test_what_is_not_http_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        asyncio.run(_get(data))
