"""A model with sliding windows behind the real server: few pages, and the same answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest
from live_server import Server, eventually
from mlx.utils import tree_flatten
from model_zoo import FAMILIES, build
from model_zoo_base import BASE
from openai import OpenAI

NAME = "gemma3_text"
STARTED = "Answer in one word. Which of all the colours that you know is the nicest one? "
STATES = "used", "cached", "free"


@pytest.fixture(scope="module")
def folder(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(small_model, tmp_path_factory.mktemp("windowed") / NAME))
    config = {"model_type": NAME, **BASE, **FAMILIES[NAME].config, "vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(build(NAME).parameters()))
    for name, rows in list(weights.items()):
        if rows.shape[0] == BASE["vocab_size"]:
            weights[name] = mx.concatenate([rows, rows[: 300 - rows.shape[0]]])
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def start(folder: Path) -> Server:
    flags = ("--kv-cache-memory", "512KiB", "--max-num-seqs", "4", "--max-num-batched-tokens", "64")
    return Server(*flags, model=folder).wait_ready()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    started = start(folder)
    yield started
    assert started.stop() == 0


def complete(server: Server, prompt: str, max_tokens: int = 23) -> tuple[str, int]:
    """The answer, and how many of the prompt's tokens were cached."""
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        completion = client.completions.create(
            model=NAME, prompt=prompt, max_tokens=max_tokens, temperature=0
        )
    assert completion.usage is not None
    details = completion.usage.prompt_tokens_details
    return completion.choices[0].text, 0 if details is None else details.cached_tokens or 0


def test_windows_have_few_pages_of_their_own(server: Server) -> None:
    complete(server, 3 * STARTED)
    cached = 'quire_kv_window_blocks{state="cached"}'
    eventually(lambda: server.metrics()[cached] > 0, "the worker has reported")
    metrics = server.idle_metrics()
    windows = {s: metrics[f'quire_kv_window_blocks{{state="{s}"}}'] for s in STATES}
    blocks = {s: metrics[f'quire_kv_blocks{{state="{s}"}}'] for s in STATES}
    assert windows["used"] == 0
    # Two of four layers have windows, and a block takes as much in both pools.
    assert sum(windows.values()) < sum(blocks.values()) / 2
    assert metrics['quire_memory_bytes{kind="kv_cache"}'] == pytest.approx(512 << 10, rel=0.05)


def test_answers_are_the_same_beside_others_and_from_the_cache(
    server: Server, folder: Path
) -> None:
    prompts = [f"{i} {STARTED * (1 + i % 3)}" for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda prompt: complete(server, prompt)[0], prompts))
    prompt, turns = STARTED, []
    for _ in range(3):
        answer, cached = complete(server, prompt)
        turns.append((prompt, answer))
        prompt = f"{prompt}{answer} And then?"
    assert cached >= 64
    another = start(folder)
    try:
        assert [complete(another, prompt)[0] for prompt in prompts] == together
        asked, answer = turns[-1]
        assert complete(another, asked) == (answer, 0)
    finally:
        another.stop()
