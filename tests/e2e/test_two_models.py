"""Two real models in one server: each says what mlx-lm says, and leaves nothing when it leaves."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from live_server import SMALL, Server, eventually, is_running, workers
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from msgspec.structs import replace

from quire.loadtest.model_folder import make_model

NAMES = "llama", "qwen"
PROMPT = list(range(70, 90))
TOKENS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("two")
    shapes = SMALL, replace(SMALL, architecture="qwen3", hidden=96, layers=3)
    for name, shape in zip(NAMES, shapes, strict=True):
        make_model(root / name, shape)
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, list[int]]:
    """mlx-lm's own greedy tokens."""
    found = {}
    for name, folder in folders.items():
        model, _ = load_model(folder)
        steps = generate_step(mx.array(PROMPT), model, max_tokens=TOKENS)
        found[name] = [int(token) for token, _ in steps]
    return found


Starter = Callable[..., Server]


@pytest.fixture
def start(folders: dict[str, Path]) -> Iterator[Starter]:
    started: list[Server] = []

    def start(*flags: str) -> Server:
        named = f"qwen={folders['qwen']}"
        own = "--kv-cache-memory", "32MiB", "--models", named
        started.append(Server(*own, *flags, model=folders["llama"]).wait_ready())
        return started[-1]

    yield start
    for server in started:
        assert server.stop() == 0


def said(server: Server, name: str) -> list[int]:
    body = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    status, _, text = server.post(
        "/v1/completions", {**body, "ignore_eos": True, "return_token_ids": True}
    )
    assert status == 200, text
    return json.loads(text)["choices"][0]["token_ids"]


def loaded(server: Server) -> set[str]:
    text = server.get("/metrics")[2]
    return set(re.findall(r'^quire_model_loaded\{model="(\w+)"\} 1', text, re.MULTILINE))


def memory(*pids: int) -> int:
    """Bytes that processes have for themselves, or in proportion where they share."""
    sizes = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(int(re.search(r"^Pss_Anon: +(\d+)", size, re.MULTILINE)[1]) << 10 for size in sizes)


def test_the_one_used_longest_ago_makes_room_and_both_say_what_mlx_lm_says(
    start: Starter, expected: dict[str, list[int]]
) -> None:
    server = start("--max-loaded-models", "1")
    for name in (*NAMES, *NAMES):
        before = workers(server.process.pid)
        was_loaded = name in loaded(server)
        assert said(server, name) == expected[name]
        assert loaded(server) == {name}
        assert (workers(server.process.pid) == before) is was_loaded
        assert len(workers(server.process.pid)) == 1


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")
def test_an_idle_model_gives_its_memory_back(
    start: Starter, expected: dict[str, list[int]]
) -> None:
    """At least 99% of it, once the front end has read a second model for the first time."""
    server = start("--model-idle-ttl", "3")
    for _ in range(2):
        eventually(lambda: not loaded(server), "both models have left")
        before = memory(server.process.pid)
        assert said(server, "llama") == expected["llama"]
        assert said(server, "qwen") == expected["qwen"]
        pids = workers(server.process.pid)
        held = memory(*pids)
    eventually(lambda: not loaded(server), "both models have left")
    assert not any(map(is_running, pids))
    assert memory(server.process.pid) - before <= 0.01 * held


def test_a_killed_worker_is_no_matter_to_the_other_model(
    start: Starter, expected: dict[str, list[int]]
) -> None:
    server = start()
    first = server.worker_pid()
    assert said(server, "qwen") == expected["qwen"]
    [second] = set(workers(server.process.pid)) - {first}
    for victim, other, name in ((second, first, "llama"), (first, None, "qwen")):
        os.kill(victim, signal.SIGKILL)
        assert said(server, name) == expected[name]
        if other is not None:
            assert other in workers(server.process.pid)
        eventually(lambda: len(workers(server.process.pid)) == 2, "it is started again")
        eventually(lambda: server.get("/ready")[0] == 200, "it is ready again")
    for name in NAMES:
        assert said(server, name) == expected[name]
