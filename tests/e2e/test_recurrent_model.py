"""A model with recurrent layers behind the real server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import openai
import pytest
from live_server import Server
from mlx.utils import tree_flatten
from model_zoo import FAMILIES, build
from model_zoo_base import BASE
from openai import OpenAI

NAME = "qwen3_5"
STARTED = "Answer in one word. Which of all the colours that you know is the nicest one? "


@pytest.fixture(scope="module")
def folder(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the weights of a vision tower, which mlx-lm's text models leave out."""
    folder = Path(shutil.copytree(small_model, tmp_path_factory.mktemp("recurrent") / NAME))
    text = FAMILIES[NAME].config["text_config"]
    config = {"model_type": NAME, **BASE, "text_config": text | {"vocab_size": 300}}
    (folder / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(build(NAME).parameters()))
    for name, rows in list(weights.items()):
        if rows.shape[0] == BASE["vocab_size"]:
            weights[name] = mx.concatenate([rows, rows[: 300 - rows.shape[0]]])
    weights["vision_tower.patch_embed.weight"] = mx.zeros((4, 4))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def start(folder: Path) -> Server:
    return Server("--kv-cache-memory", "16MiB", "--max-num-seqs", "4", model=folder).wait_ready()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    started = start(folder)
    yield started
    assert started.stop() == 0


def client_of(server: Server) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with client_of(server) as made:
        yield made


def complete(client: OpenAI, prompt: str, max_tokens: int) -> tuple[str, int]:
    """The answer, and how many of the prompt's tokens were cached."""
    completion = client.completions.create(
        model=NAME, prompt=prompt, max_tokens=max_tokens, temperature=0
    )
    assert completion.usage is not None
    details = completion.usage.prompt_tokens_details
    return completion.choices[0].text, 0 if details is None else details.cached_tokens or 0


def test_the_next_turn_is_cached_and_says_what_it_would_say_anyway(
    client: OpenAI, folder: Path
) -> None:
    prompt, behind = STARTED, 0
    for _ in range(4):
        answer, cached = complete(client, prompt, 23)
        # Up to the last prompt's end at least: what the model says need not be text, and is then
        # encoded as other tokens.
        assert behind - 16 - 8 < cached <= behind + 23
        asked, prompt = prompt, f"{prompt}{answer} And then?"
        behind = len(asked.encode())
    another = start(folder)
    try:
        with client_of(another) as fresh:
            assert complete(fresh, asked, 23) == (answer, 0)
    finally:
        another.stop()


def test_slots_are_counted(server: Server, client: OpenAI) -> None:
    complete(client, "Which colour?", 4)
    metrics = server.idle_metrics()
    slots = {s: metrics[f'quire_state_slots{{state="{s}"}}'] for s in ("used", "cached", "free")}
    assert slots["cached"] > 0
    assert metrics['quire_memory_bytes{kind="states"}'] > 0


def test_an_image_is_refused_by_name(client: OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError, match="only text") as caught:
        client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": [{"type": "text", "text": "What?"}, image]}],  # type: ignore[list-item,misc]
        )
    assert caught.value.param == "messages[0].content[1].type"
