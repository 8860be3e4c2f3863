"""Bodies at the configured limit, while others stream: order, completion and memory."""

from __future__ import annotations

import json
import socket
import sys
import threading
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from live_server import PATIENCE, Server

LIMIT = 2 * 2**20  # the default of --max-body-size
LONG = "the cat sat " * ((LIMIT - 1000) // 12)


def stream(server: Server, after_first: threading.Event | None = None) -> list[str]:
    """The chunks of one long stream; ``after_first`` is set once it runs."""
    body = {"model": "small", "prompt": "Once", "max_tokens": 400, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        server.url + "/v1/completions",
        json.dumps({**body, "ignore_eos": True}).encode(),
        {"Content-Type": "application/json"},
    )
    events = []
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        for line in response:
            if line.startswith(b"data: "):
                events.append(line.decode()[6:].strip())
                if after_first is not None:
                    after_first.set()
    return events


def text_of(events: list[str]) -> str:
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def test_streams_go_on_while_hopeless_prompts_are_refused_and_long_texts_are_counted(server):
    alone = text_of(stream(server))
    before = server.metrics()["process_resident_memory_bytes"]
    running = threading.Event()
    with ThreadPoolExecutor(10) as pool:
        streaming = pool.submit(stream, server, running)
        assert running.wait(PATIENCE)
        chat = {"model": "small", "messages": [{"role": "user", "content": LONG}]}
        replies = [
            *(
                pool.submit(server.post, "/v1/completions", {"model": "small", "prompt": LONG})
                for _ in range(4)
            ),
            pool.submit(server.post, "/v1/chat/completions", chat),
            *(pool.submit(server.post, "/tokenize", {"prompt": LONG}) for _ in range(3)),
        ]
        health = server.get("/health")
        assert text_of(streaming.result()) == alone
    assert health[0] == 200
    *refused, _, _, _ = [reply.result() for reply in replies]
    for status, _, text in refused:
        assert status == 400
        assert json.loads(text)["error"]["code"] == "context_length_exceeded"
    counts = {json.loads(reply.result()[2])["count"] for reply in replies[-3:]}
    assert len(counts) == 1
    assert counts.pop() >= len(LONG) / 12
    metrics = server.idle_metrics()
    if sys.platform == "linux":
        # A single such text takes some 300 MB while it is encoded.
        assert metrics["process_resident_memory_bytes"] < before + 150e6


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_clients_that_leave_their_long_texts_behind_harm_nobody(server, path):
    data = json.dumps({"model": "small", "prompt": LONG}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    address = urllib.parse.urlsplit(server.url)
    for _ in range(6):
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(head.encode() + data)
    body = {"model": "small", "prompt": "Hello", "max_tokens": 2}
    assert server.post("/v1/completions", body)[0] == 200
    assert server.post("/tokenize", {"prompt": LONG})[0] == 200
