from __future__ import annotations

import asyncio

import pytest
from fake_chat_server import (
    CHUNKED_HEAD,
    Answer,
    Request,
    Served,
    as_chunks,
    complete_answer,
    respond,
    sends,
    serving,
)

from quire.loadtest.results import LoadResult
from quire.loadtest.serve import LoadOptions, find_target, measure_load
from quire.loadtest.workloads import WorkloadName, WorkloadSpec


async def _measure(answer: Answer, options: LoadOptions) -> tuple[LoadResult, Served]:
    async with serving(answer) as server:
        target, header = await find_target(server.base, None, options)
        return await measure_load(target, header, options), server


def _options(
    name: WorkloadName = "uniform", requests: int = 12, clients: int = 3, warmup: int = 0
) -> LoadOptions:
    return LoadOptions(WorkloadSpec(name=name, requests=requests), clients, warmup)


def test_every_request_is_sent_once_and_recorded() -> None:
    result, server = asyncio.run(_measure(sends(complete_answer()), _options()))
    chats = [r.body["messages"][0]["content"] for r in server.requests if r.body]
    assert len(chats) == len(set(chats)) == 13  # one of them asked whether the server answers
    assert sorted(record.index for record in result.records) == list(range(12))
    assert result.summary.requests_completed == 12
    assert result.summary.output_tokens == 24
    assert result.model == "fake"
    assert result.server == "fake/1"


def test_no_more_requests_than_clients_are_in_flight() -> None:
    now = peak = 0

    async def slow(request: Request, writer: asyncio.StreamWriter) -> None:
        nonlocal now, peak
        now += 1
        peak = max(peak, now)
        await asyncio.sleep(0.005)
        writer.write(complete_answer())
        now -= 1

    asyncio.run(_measure(slow, _options(requests=20, clients=4)))
    assert peak == 4


def test_warm_up_is_not_measured_and_has_its_own_texts() -> None:
    result, server = asyncio.run(_measure(sends(complete_answer()), _options(warmup=5)))
    chats = [r.body["messages"][0]["content"] for r in server.requests if r.body]
    assert len(chats) == len(set(chats)) == 1 + 5 + 12
    assert len(result.records) == 12


def test_multiturn_feeds_answers_back() -> None:
    result, server = asyncio.run(
        _measure(sends(complete_answer("xyz")), _options("multiturn", 8, clients=1))
    )
    histories = [r.body["messages"] for r in server.requests if r.body][1:]
    assert [len(history) for history in histories] == [1, 3, 5, 7] * 2
    assert histories[3][:6] == [
        *histories[2],
        {"role": "assistant", "content": "xyz"},
    ]
    assert [record.turn for record in result.records] == [0, 1, 2, 3] * 2
    asked = [record.prompt_tokens or 0 for record in result.records]
    assert result.summary.repeated_prompt_tokens == sum(asked[:3] + asked[4:7])


def test_a_failed_turn_ends_its_conversation_and_is_counted() -> None:
    async def full(request: Request, writer: asyncio.StreamWriter) -> None:
        second = len(request.body["messages"]) == 3
        writer.write(respond(429, {"error": "full"}) if second else complete_answer())

    result, _ = asyncio.run(_measure(full, _options("multiturn", 8)))
    assert result.summary.requests_planned == 8
    assert result.summary.requests_completed == 2
    assert result.summary.errors == {"http 429": 2}


def test_a_server_that_breaks_does_not_stop_the_run() -> None:
    count = 0

    async def fading(request: Request, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        cut = CHUNKED_HEAD + as_chunks(b": x\n\n", 9)[:-3]
        writer.write(complete_answer() if count <= 6 else cut)

    result, _ = asyncio.run(_measure(fading, _options()))
    assert result.summary.requests_completed == 5
    assert result.summary.errors == {"truncated": 7}


def test_no_clients_is_an_error() -> None:
    with pytest.raises(ValueError, match="--clients"):
        asyncio.run(_measure(sends(complete_answer()), _options(clients=0)))
