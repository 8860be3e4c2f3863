"""A worker that encodes steps on a thread of their own, over HTTP, on the CPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from live_server import Server, eventually
from openai import OpenAI

AHEAD = Path(__file__).with_name("serve_ahead.py")


@pytest.fixture(scope="module")
def ahead(small_model: Path) -> Iterator[Server]:
    started = Server("--kv-cache-memory", "4MiB", model=small_model, script=AHEAD).wait_ready()
    yield started
    assert started.stop() == 0


def answers(server: Server, hang_up: bool) -> list[str]:
    """Of 40 clients at once; every third of them may stop reading after some tokens."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

    def ask(index: int) -> str:
        text = ""
        with client.completions.create(
            model="small",
            prompt="shared beginning " * 8 + "x" * index,
            max_tokens=10 + index,
            temperature=0 if index % 2 else 0.9,
            seed=index,
            stream=True,
        ) as stream:
            for count, chunk in enumerate(stream):
                text += chunk.choices[0].text
                if hang_up and index % 3 == 0 and count == 3:
                    return ""
        return text if not hang_up or index % 3 else ""

    with ThreadPoolExecutor(40) as threads:
        return list(threads.map(ask, range(40)))


def test_answers_are_those_of_one_thread(server: Server, ahead: Server) -> None:
    expected = answers(server, hang_up=False)
    assert answers(ahead, hang_up=False) == expected
    left = answers(ahead, hang_up=True)
    assert [text for text in left if text] == [
        text for index, text in enumerate(expected) if index % 3 and text
    ]
    eventually(lambda: ahead.metrics()["quire_requests_running"] == 0, "all have left")


def test_a_killed_worker_is_replaced(ahead: Server) -> None:
    os.kill(ahead.worker_pid(), signal.SIGKILL)
    restarts = "quire_worker_restarts_total"
    eventually(lambda: ahead.metrics().get(restarts) == 1, "the worker is replaced")
    eventually(lambda: ahead.get("/ready")[0] == 200, "the next worker is ready")
    assert answers(ahead, hang_up=False)
