"""Helper processes: what a job may do to itself, and that nobody else notices."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop

from quire.serve.helper_errors import (
    HelperBusy,
    HelperCrashed,
    HelperError,
    HelperFailed,
    HelperOutOfMemory,
    HelperRefused,
    HelperTimeout,
)
from quire.serve.helpers import HelperLimits, HelperPool
from quire.serve.process_memory import resident_bytes

Run = Callable[[Callable[[], Awaitable[None]]], None]


@pytest.fixture(autouse=True)
def importable_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@asynccontextmanager
async def pool(**limits: Any) -> AsyncIterator[HelperPool]:
    settings = HelperLimits(**{"processes": 1, "seconds": 20.0, **limits})
    async with HelperPool("helper_jobs:make", {"name": "x"}, settings) as helpers:
        yield helpers


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a test on a loop whose transports differ; the server has uvloop's where it is there."""
    run_loop = uvloop.run if request.param == "uvloop" else asyncio.run
    return lambda test: run_loop(test())  # type: ignore[arg-type]


async def echo(helpers: HelperPool, value: Any = 1) -> int:
    """Asserts that the pool works; returns the process id of the helper that answered."""
    name, back, pid = await helpers.call({"do": "echo", "value": value})
    assert (name, back) == ("x", value)
    return int(pid)


def test_values_come_back_from_the_same_process(run: Run) -> None:
    async def check() -> None:
        async with pool() as helpers:
            first = await echo(helpers, {"a": [1, None, "ä" * 100_000]})
            assert await echo(helpers) == first != os.getpid()
        assert resident_bytes(first) == 0  # gone with the pool

    run(check)


def test_a_refusal_and_a_failing_handler_leave_the_process_alive(run: Run) -> None:
    async def check() -> None:
        async with pool() as helpers:
            pid = await echo(helpers)
            with pytest.raises(HelperRefused) as refused:
                await helpers.call({"do": "refuse"})
            assert refused.value.details == {"reason": "no", "path": "a.b"}
            with pytest.raises(HelperFailed, match="KeyError: 'missing'"):
                await helpers.call({"do": "fail"})
            await helpers.call({"do": "print"})
            assert await echo(helpers) == pid

    run(check)


def test_a_job_without_end_is_stopped_and_the_process_replaced(run: Run) -> None:
    async def check() -> None:
        async with pool(seconds=0.3) as helpers:
            pid = await echo(helpers)
            with pytest.raises(HelperTimeout, match=r"0\.3 s"):
                await helpers.call({"do": "loop"})
            assert await echo(helpers) != pid
            assert resident_bytes(pid) == 0

    run(check)


@pytest.mark.parametrize("job", ["allocate", "allocate at once"])
@pytest.mark.parametrize("limit_address_space", [False, True])
def test_a_job_gets_only_so_much_memory(run: Run, job: str, limit_address_space: bool) -> None:
    async def check() -> None:
        limits = {"memory": 128 << 20, "limit_address_space": limit_address_space}
        async with pool(**limits) as helpers:
            pid = await echo(helpers)
            assert await helpers.call({"do": job, "mib": 64}) > 0
            assert await echo(helpers) == pid
            with pytest.raises(HelperOutOfMemory, match="128 MiB"):
                await helpers.call({"do": job, "mib": 1024})
            assert await echo(helpers) != pid

    run(check)


def test_a_dying_process_is_replaced(run: Run) -> None:
    async def check() -> None:
        async with pool() as helpers:
            pid = await echo(helpers)
            with pytest.raises(HelperCrashed, match="died"):
                await helpers.call({"do": "die"})
            second = await echo(helpers)
            assert second != pid
            os.kill(second, signal.SIGKILL)  # while idle: the next job finds out and is told
            with pytest.raises(HelperCrashed, match="died"):
                await echo(helpers)
            assert await echo(helpers) not in (pid, second)

    run(check)


def test_one_endless_job_does_not_hold_up_the_others(run: Run) -> None:
    async def check() -> None:
        async with pool(processes=2, seconds=5.0) as helpers:
            endless = asyncio.create_task(helpers.call({"do": "loop"}))
            pids = await asyncio.gather(*(echo(helpers, i) for i in range(50)))
            assert len(set(pids)) <= 2
            assert not endless.done()
            with pytest.raises(HelperTimeout):
                await endless

    run(check)


def test_small_jobs_do_not_wait_for_large_ones(run: Run) -> None:
    async def check() -> None:
        async with pool(processes=2, reserved=10_000) as helpers:
            await asyncio.gather(*(echo(helpers, i) for i in range(10)))
            job = {"do": "sleep", "seconds": 15, "text": "x" * 20_000}
            large = [asyncio.create_task(helpers.call(job)) for _ in range(3)]
            await asyncio.sleep(0)
            assert len({await echo(helpers, i) for i in range(10)}) == 1
            assert not any(task.done() for task in large)

    run(check)


def test_a_single_process_takes_jobs_of_all_sizes(run: Run) -> None:
    async def check() -> None:
        async with pool(processes=1, reserved=10) as helpers:
            assert await echo(helpers, "x" * 1000)

    run(check)


@pytest.mark.parametrize("job", ["sleep", "refuse", "fail"])
def test_a_large_job_is_forgotten_once_it_has_ended(run: Run, job: str) -> None:
    """At once, not when the garbage collector finds it beside its error."""

    async def send(helpers: HelperPool) -> None:
        with suppress(HelperError):
            await helpers.call({"do": job, "seconds": 0, "text": "x" * 2**24})
        await asyncio.sleep(0.1)  # the pool waits for the next job then

    async def check() -> None:
        async with pool() as helpers:
            await echo(helpers)
            tracemalloc.start()
            gc.disable()
            try:
                await send(helpers)
                held, _ = tracemalloc.get_traced_memory()
            finally:
                gc.enable()
                tracemalloc.stop()
        assert held < 2**20

    run(check)


def test_many_bad_jobs_at_once_each_get_their_own_error(run: Run) -> None:
    async def check() -> None:
        async with pool(processes=2, seconds=2.0, memory=128 << 20) as helpers:
            jobs: list[dict[str, Any]] = [
                {"do": "loop"},
                {"do": "die"},
                {"do": "allocate", "mib": 1024},
                {"do": "refuse"},
                {"do": "echo", "value": 5},
            ] * 2
            replies = await asyncio.gather(*map(helpers.call, jobs), return_exceptions=True)
            kinds = [HelperTimeout, HelperCrashed, HelperOutOfMemory, HelperRefused, list] * 2
            assert [type(reply) for reply in replies] == kinds

    run(check)


def test_too_many_waiting_jobs_are_refused_and_the_others_done(run: Run) -> None:
    async def check() -> None:
        async with pool(waiting=3) as helpers:
            await echo(helpers)
            slow = asyncio.create_task(helpers.call({"do": "sleep", "seconds": 0.3}))
            await asyncio.sleep(0.1)  # it is being worked on: no longer waits
            waiting = [asyncio.create_task(echo(helpers, i)) for i in range(3)]
            await asyncio.sleep(0)
            with pytest.raises(HelperBusy):
                await echo(helpers)
            await asyncio.gather(slow, *waiting)

    run(check)


def test_a_caller_that_leaves_harms_nobody(run: Run) -> None:
    async def check() -> None:
        async with pool() as helpers:
            pid = await echo(helpers)
            working = asyncio.create_task(helpers.call({"do": "sleep", "seconds": 0.2}))
            waiting = asyncio.create_task(helpers.call({"do": "die"}))
            await asyncio.sleep(0.05)
            working.cancel()
            waiting.cancel()
            assert await echo(helpers, "still right") == pid

    run(check)


def test_a_pool_that_cannot_start_says_why_for_each_job(run: Run) -> None:
    async def check() -> None:
        limits = HelperLimits(processes=1)
        async with HelperPool("helper_jobs:make", {"broken": True}, limits) as helpers:
            for _ in range(2):
                with pytest.raises(HelperFailed, match="cannot start"):
                    await helpers.call({"do": "echo"})

    run(check)


def test_closing_ends_working_processes_and_their_callers(run: Run) -> None:
    async def check() -> None:
        helpers = HelperPool("helper_jobs:make", {"name": "x"}, HelperLimits(processes=1))
        helpers.start()
        pid = await echo(helpers)
        working = asyncio.create_task(helpers.call({"do": "loop"}))
        waiting = asyncio.create_task(helpers.call({"do": "loop"}))
        await asyncio.sleep(0.05)
        await helpers.close()
        for caller in (working, waiting):
            with pytest.raises(asyncio.CancelledError):
                await caller
        assert resident_bytes(pid) == 0

    run(check)
