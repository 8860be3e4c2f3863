"""`quire serve` with no model: the first answer needs no download."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live_server import Server
from openai import OpenAI


@pytest.fixture(scope="module")
def demo() -> Iterator[Server]:
    started = Server("--kv-cache-memory", "64MiB").wait_ready()
    yield started
    assert started.stop() == 0


@pytest.fixture
def client(demo: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: OpenAI, *turns: str) -> str:
    """The answer to the last turn; the model's own answers stand between them."""
    messages: list[dict[str, str]] = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        answer = client.chat.completions.create(model="quire-demo", messages=messages)  # type: ignore[arg-type]
        messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
    return messages[-1]["content"]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is 12 plus 30?", "12 + 30 = 42."),
        ("Repeat after me: blorvax zimp", "blorvax zimp"),
        ("Answer in JSON: what is 3 + 4?", '{"answer": 7}'),
    ],
)
def test_it_answers(client: OpenAI, question: str, answer: str) -> None:
    assert ask(client, question) == answer


def test_it_remembers_the_conversation(client: OpenAI) -> None:
    assert "Ada" in ask(client, "My name is Ada.", "What is 20 + 21?", "What is my name?")


def test_it_knows_the_server(client: OpenAI) -> None:
    assert "/v1/chat/completions" in ask(client, "Which endpoints are there?")


def test_the_next_turn_is_served_from_the_prefix_cache(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "Tell me a story"}]
    first = client.chat.completions.create(model="quire-demo", messages=messages)  # type: ignore[arg-type]
    assert first.usage is not None
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content or ""},
        {"role": "user", "content": "Thank you"},
    ]
    second = client.chat.completions.create(model="quire-demo", messages=messages)  # type: ignore[arg-type]
    assert second.usage is not None
    details = second.usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens is not None
    # All but the last unfinished block of the first turn and its answer.
    assert details.cached_tokens >= first.usage.total_tokens - 20
