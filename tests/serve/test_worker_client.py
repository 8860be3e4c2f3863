"""Requests over the frames: order, abort, admission, failure, and what is counted on the way."""

from __future__ import annotations

import asyncio

import pytest
from fake_worker import ERROR, STALL
from worker_harness import MODEL, collect, rig, tokens_of, until

from quire.engine.messages import (
    GenerateRequest,
    SamplingParams,
    StepOutput,
    TokenOutput,
    WorkerConfig,
)
from quire.serve.backend import GenerationFailed, QueueFull, Unavailable
from quire.serve.metrics import Metrics
from quire.serve.supervisor import Supervisor
from quire.serve.worker_client import RequestStream, WorkerClient


def open_stream(prompt_tokens: int = 3) -> tuple[WorkerClient, RequestStream]:
    """A stream whose outputs the test delivers by hand."""
    client = WorkerClient(Metrics().for_model(MODEL), 10)
    request = GenerateRequest(1, [0] * prompt_tokens, 10, SamplingParams())
    stream = RequestStream(client, request)
    client._streams[1] = stream
    return client, stream


def test_concurrent_requests_get_their_own_tokens_in_order():
    async def scenario():
        async with rig() as r:
            streams = [r.submit([i, 1000 * i], 30) for i in range(1, 21)]
            results = await asyncio.gather(*map(collect, streams))
            for i, outputs in enumerate(results, start=1):
                assert tokens_of(outputs) == list(range(1000 * i + 1, 1000 * i + 31))
                assert [o.finish_reason for o in outputs if o.finish_reason] == ["length"]
                assert outputs[0].num_cached_tokens == 1
            assert r.client.num_in_flight == 0

    asyncio.run(scenario())


def test_requests_are_numbered_by_the_client():
    async def scenario():
        async with rig() as r:
            streams = [r.submit([1], 1) for _ in range(20)]
            assert len({stream.request_id for stream in streams}) == 20
            await asyncio.gather(*map(collect, streams))

    asyncio.run(scenario())


def test_close_aborts_in_the_worker_and_is_idempotent():
    async def scenario():
        async with rig() as r:
            stream = r.submit([STALL], 50)
            await anext(stream)
            stream.close()
            stream.close("stop")
            assert await collect(stream) == []
            assert r.client.num_in_flight == 0
            await until(lambda: r.value("requests_running") == 0)
            assert r.value("requests_total", finish_reason="abort") == 1
            assert r.value("requests_total", finish_reason="stop") == 0

    asyncio.run(scenario())


def test_close_for_a_stop_string_counts_as_stop():
    async def scenario():
        async with rig() as r:
            stream = r.submit([STALL], 50)
            await anext(stream)
            stream.close("stop")
            assert r.value("requests_total", finish_reason="stop") == 1

    asyncio.run(scenario())


def test_close_after_the_end_changes_nothing():
    async def scenario():
        async with rig() as r:
            stream = r.submit([1])
            await collect(stream)
            stream.close()
            assert r.value("requests_total", finish_reason="length") == 1
            assert r.value("requests_total", finish_reason="abort") == 0

    asyncio.run(scenario())


def test_closing_wakes_the_reader():
    async def scenario():
        async with rig() as r:
            stream = r.submit([STALL], 50)
            await anext(stream)
            reader = asyncio.create_task(collect(stream))
            await asyncio.sleep(0)
            stream.close()
            assert await reader == []

    asyncio.run(scenario())


def test_a_cancelled_reader_loses_nothing():
    async def scenario():
        client, stream = open_stream()
        reader = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.wait({reader})
        client.deliver(StepOutput([TokenOutput(1, [7], "length")]))
        assert tokens_of(await collect(stream)) == [7]

    asyncio.run(scenario())


def test_admission_is_bounded_and_recovers():
    async def scenario():
        async with rig(max_in_flight=2) as r:
            streams = [r.submit([STALL]), r.submit([STALL])]
            with pytest.raises(QueueFull, match="2 requests") as caught:
                r.submit([1])
            assert caught.value.retry_after >= 1
            assert r.value("admission_rejections_total", reason="queue_full") == 1
            streams[0].close()
            assert len(tokens_of(await collect(r.submit([1])))) == 5
            streams[1].close()

    asyncio.run(scenario())


def test_an_error_of_the_worker_fails_only_its_request():
    async def scenario():
        async with rig() as r:
            bad, good = r.submit([ERROR, 4], 50), r.submit([1], 50)
            await until(lambda: r.value("requests_total", finish_reason="error") == 1)
            assert tokens_of([await anext(bad)]) == [5]
            with pytest.raises(GenerationFailed, match=r"The scripted failure\."):
                await anext(bad)
            assert len(tokens_of(await collect(good))) == 50

    asyncio.run(scenario())


def test_a_slow_reader_gets_several_steps_at_once():
    async def scenario():
        client, stream = open_stream()
        client.deliver(StepOutput([TokenOutput(1, [1], None, 2)]))
        client.deliver(StepOutput([TokenOutput(1, [2, 3])]))
        client.deliver(StepOutput([TokenOutput(1, [4], "stop")]))
        assert await collect(stream) == [TokenOutput(1, [1, 2, 3, 4], "stop", 2)]

    asyncio.run(scenario())


def test_frames_that_wait_are_read_together_and_in_turns():
    frames = [StepOutput([TokenOutput(1, [i], "length" if i == 99 else None)]) for i in range(100)]

    class BusyChannel:
        async def receive(self) -> StepOutput:
            return frames.pop(0) if frames else await asyncio.Event().wait()

    async def scenario():
        client, stream = open_stream()
        supervisor = Supervisor(client, WorkerConfig("model", "", ""), [])
        receiving = asyncio.create_task(supervisor._receive(BusyChannel()))
        outputs = await collect(stream)
        receiving.cancel()
        assert tokens_of(outputs) == list(range(100))
        assert 1 < len(outputs) < 50

    asyncio.run(scenario())


def test_outputs_of_a_closed_request_are_dropped():
    async def scenario():
        client, stream = open_stream()
        stream.close()
        client.deliver(StepOutput([TokenOutput(1, [1])]))
        assert await collect(stream) == []

    asyncio.run(scenario())


def test_nothing_is_accepted_before_a_worker_is_there():
    metrics = Metrics()
    client = WorkerClient(metrics.for_model(MODEL), 10)
    assert not client.alive
    assert client.info is None
    with pytest.raises(Unavailable, match="loading"):
        client.submit(GenerateRequest(1, [1], 1, SamplingParams()))
    body, _ = metrics.render("")
    assert b'quire_admission_rejections_total{model="model",reason="loading"} 1.0' in body


def test_counts_agree_with_what_the_clients_received():
    requests, prompt, generated = 12, 6, 9

    async def scenario():
        async with rig() as r:
            streams = [r.submit([i] * prompt, generated) for i in range(requests)]
            results = await asyncio.gather(*map(collect, streams))
            assert sum(len(tokens_of(outputs)) for outputs in results) == requests * generated
            assert r.value("prompt_tokens_total") == requests * prompt
            assert r.value("prompt_tokens_cached_total") == requests * prompt / 2
            assert r.value("generated_tokens_total") == requests * generated
            assert r.value("requests_total", finish_reason="length") == requests
            assert r.value("time_to_first_token_seconds_count") == requests
            assert r.value("inter_token_latency_seconds_count") == requests * (generated - 1)
            for histogram in (
                *("e2e_latency_seconds", "queue_time_seconds", "prefill_time_seconds"),
                *("decode_time_seconds", "time_per_output_token_seconds"),
                *("request_prompt_tokens", "request_generated_tokens"),
            ):
                assert r.value(f"{histogram}_count") == requests, histogram
            assert r.value("request_prompt_tokens_sum") == requests * prompt
            assert r.value("request_generated_tokens_sum") == requests * generated
            await until(lambda: r.value("requests_running") == 0)

    asyncio.run(scenario())


def test_a_vector_counts_its_prompt_and_no_token():
    async def scenario():
        client, stream = open_stream(prompt_tokens=5)
        output = TokenOutput(1, [], "stop", 2, queue_seconds=0.5, vector=b"\0\0\0\0")
        client.deliver(StepOutput([output]))
        [taken] = [output async for output in stream]
        assert taken.vector == b"\0\0\0\0"
        metrics = client.metrics
        assert metrics.prompt_tokens_cached._value.get() == 2
        assert metrics.request_prompt_tokens._sum.get() == 5
        assert metrics.queue_time._sum.get() == 0.5
        assert metrics.time_to_first_token._sum.get() == 0
        assert metrics.requests["stop"]._value.get() == 1
        assert client.num_in_flight == 0

    asyncio.run(scenario())
