"""A worker that lives but does nothing is found, and one that only takes its time is left alone."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
from fake_worker import HANG, STALL
from worker_harness import collect, rig, tokens_of, until

from quire.serve import watchdog
from quire.serve.backend import GenerationFailed
from quire.serve.watchdog import LEAST_STEP_LIMIT, AnswerPipe, step_limit, until_hung


@pytest.fixture
def fast_ticks(monkeypatch):
    """Two seconds of silence while serving, ten while loading: a busy machine is no dead worker."""
    monkeypatch.setattr(watchdog, "TICK", 0.05)
    monkeypatch.setattr(watchdog, "MAX_UNANSWERED", 40)
    monkeypatch.setattr(watchdog, "MAX_UNANSWERED_LOADING", 200)


def test_a_stopped_worker_fails_its_requests_and_is_replaced(fast_ticks):
    async def scenario():
        async with rig() as r:
            pid = r.pid
            streams = [r.submit([STALL, i], 50) for i in range(3)]
            for stream in streams:
                await anext(stream)
            os.kill(pid, signal.SIGSTOP)
            for stream in streams:
                with pytest.raises(GenerationFailed, match="has not answered"):
                    await anext(stream)
            await until(lambda: r.client.info is not None and r.pid != pid)
            assert len(tokens_of(await collect(r.submit([1])))) == 5
            assert r.value("worker_restarts_total") == 1

    asyncio.run(scenario())


def test_an_idle_worker_that_was_stopped_is_found_by_the_first_request(fast_ticks):
    async def scenario():
        async with rig() as r:
            await until(lambda: r.value("requests_running") == 0)
            os.kill(r.pid, signal.SIGSTOP)
            with pytest.raises(GenerationFailed, match="has not answered"):
                await collect(r.submit([1]))

    asyncio.run(scenario())


def test_a_step_that_never_ends_fails_its_requests_and_the_worker_is_replaced(fast_ticks):
    async def scenario():
        async with rig(step_timeout=0.3) as r:
            pid = r.pid
            stream = r.submit([HANG], 50)
            await anext(stream)
            with pytest.raises(GenerationFailed, match="has not ended after"):
                await anext(stream)
            await until(lambda: r.client.info is not None and r.pid != pid)

    asyncio.run(scenario())


def test_a_long_step_is_left_alone(fast_ticks):
    """It lasts many times as long as a stopped worker would be left."""

    async def scenario():
        async with rig() as r:
            stream = r.submit([HANG], 50)
            await anext(stream)
            reading = asyncio.create_task(anext(stream))
            await asyncio.sleep(2 * watchdog.MAX_UNANSWERED * watchdog.TICK)
            assert not reading.done()
            assert r.client.alive
            reading.cancel()

    asyncio.run(scenario())


def test_a_worker_that_is_stopped_over_its_load_is_replaced(fast_ticks):
    async def scenario():
        async with rig("hang-load", wait=False) as r:
            await until(lambda: bool(r.progress))
            pid = r.pid
            os.kill(pid, signal.SIGSTOP)
            await until(lambda: r.pid != pid)

    asyncio.run(scenario())


def test_the_front_ends_own_pauses_do_not_count(fast_ticks):
    """As when it is stopped in a terminal, or the machine sleeps."""

    async def scenario():
        async with rig() as r:
            stream = r.submit([STALL], 50)
            await anext(stream)
            time.sleep(2 * watchdog.MAX_UNANSWERED * watchdog.TICK)  # noqa: ASYNC251 - the pause
            await asyncio.sleep(4 * watchdog.TICK)
            assert r.client.num_in_flight == 1
            stream.close()

    asyncio.run(scenario())


def test_nothing_is_asked_without_work(fast_ticks):
    asked = []

    async def scenario():
        pipe = AnswerPipe()
        no_work = asyncio.Event()

        async def work() -> None:
            await no_work.wait()

        watching = asyncio.create_task(until_hung(lambda: asked.append(1), pipe, work, lambda: 1.0))
        await asyncio.sleep(4 * watchdog.TICK)
        watching.cancel()
        pipe.close()

    asyncio.run(scenario())
    assert asked == []


def test_the_limit_of_a_step_grows_with_the_warm_up():
    assert step_limit(0.5) == LEAST_STEP_LIMIT
    assert step_limit(100.0) == 3000.0
