"""The official openai package against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from live_server import Server
from openai import AsyncOpenAI, OpenAI

MODEL = "small"
MESSAGES = [{"role": "user", "content": "Hello there"}]


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def test_chat(client: OpenAI) -> None:
    completion = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=12, temperature=0
    )
    choice = completion.choices[0]
    assert completion.object == "chat.completion"
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 12
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 12


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_stream_adds_up_to_the_whole_answer(client: OpenAI, temperature: float) -> None:
    options = {"max_tokens": 40, "temperature": temperature, "seed": 3}
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, **options)
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, stream_options={"include_usage": True}, **options
    ) as stream:
        for _ in stream:
            pass
        with pytest.raises(openai.LengthFinishReasonError) as caught:
            stream.get_final_completion()
    streamed = caught.value.completion
    assert streamed.choices[0].message.content == whole.choices[0].message.content
    assert streamed.choices[0].message.role == "assistant"
    assert streamed.choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert streamed.usage is not None
    assert whole.usage is not None
    assert streamed.usage.completion_tokens == whole.usage.completion_tokens == 40


def test_completions_take_text_and_tokens_and_batches(client: OpenAI) -> None:
    text = client.completions.create(model=MODEL, prompt="abc", max_tokens=8, temperature=0)
    ids = [3 + byte for byte in b"abc"]
    tokens = client.completions.create(model=MODEL, prompt=ids, max_tokens=8, temperature=0)
    both = client.completions.create(
        model=MODEL, prompt=["abc", "xyz"], max_tokens=8, temperature=0
    )
    assert text.choices[0].text == tokens.choices[0].text == both.choices[0].text
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.usage is not None
    assert both.usage.completion_tokens == 16


def test_a_stop_string_is_not_shown_and_ends_the_generation(client: OpenAI) -> None:
    free = client.completions.create(model=MODEL, prompt="abc", max_tokens=60, temperature=0)
    text = free.choices[0].text
    stop = text[20:23]
    stopped = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=60, temperature=0, stop=stop
    )
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens == text.index(stop) + len(stop)


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_name_the_field(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, n=200)
    assert caught.value.param == "n"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x" * 2000}]
        )
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"


def test_concurrent_streams_keep_their_texts_apart(server: Server) -> None:
    prompts = [f"Tell me about number {i} " * (1 + i % 5) for i in range(24)]

    async def stream(client: AsyncOpenAI, prompt: str, index: int) -> str:
        # A mixture of parameters, so that rows take different sampling paths in one step.
        options = [{"temperature": 0}, {"seed": index}, {"seed": index, "top_p": 0.8}][index % 3]
        pieces = []
        async for chunk in await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": prompt}],
            max_tokens=30,
            stream=True,
            **options,
        ):
            pieces.append(chunk.choices[0].delta.content or "")
        return "".join(pieces)

    async def everything() -> tuple[list[str], list[str]]:
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
            together = await asyncio.gather(*(stream(client, p, i) for i, p in enumerate(prompts)))
            alone = [await stream(client, p, i) for i, p in enumerate(prompts)]
            return list(together), alone

    together, alone = asyncio.run(everything())
    assert together == alone
    assert all(together)
