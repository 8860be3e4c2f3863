"""The worker process through its life: loading, death, restart, drain, and its parent's death."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from fake_worker import DIE, STALL
from worker_harness import LIMIT, collect, rig, tokens_of, until

from quire.engine.messages import WorkerConfig
from quire.serve import supervisor as supervisor_module
from quire.serve.backend import GenerationFailed, Unavailable
from quire.serve.metrics import Metrics
from quire.serve.supervisor import StartupFailed, Supervisor
from quire.serve.worker_client import WorkerClient, WorkerState


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie has no command line; nobody may have reaped it yet.
    return bool(Path(f"/proc/{pid}/cmdline").read_bytes()) if Path("/proc").exists() else True


def test_serves_after_loading():
    async def scenario():
        async with rig() as r:
            assert r.client.alive
            assert [p.stage for p in r.progress] == ["loading weights"]
            assert tokens_of(await collect(r.submit([10, 20]))) == [21, 22, 23, 24, 25]

    asyncio.run(scenario())


def test_loading_is_unavailable_but_alive():
    async def scenario():
        async with rig("hang-load", wait=False) as r:
            await until(lambda: bool(r.progress))
            assert r.client.alive
            assert r.client.info is None
            with pytest.raises(Unavailable, match="loading") as caught:
                r.submit([1])
            assert caught.value.retry_after >= 1

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("mode", "message", "permanent"),
    [
        ("load-error", "The architecture frobnicator is not supported.", True),
        ("crash", "The worker exited with code 3.", False),
    ],
)
def test_a_failure_before_the_first_ready_ends_the_start(mode, message, permanent):
    async def scenario():
        async with rig(mode, wait=False) as r:
            with pytest.raises(StartupFailed) as caught:
                await asyncio.wait_for(r.running, LIMIT)
            assert str(caught.value) == message
            assert caught.value.permanent is permanent
            assert not r.client.alive

    asyncio.run(scenario())


def test_a_worker_killed_over_the_first_load_is_replaced(tmp_path):
    async def scenario():
        async with rig(f"first:{tmp_path / 'marker'}:killed-load") as r:
            assert len(tokens_of(await collect(r.submit([1])))) == 5
            assert r.value("worker_restarts_total") == 1

    asyncio.run(scenario())


def test_a_worker_killed_over_every_first_load_ends_the_start():
    async def scenario():
        async with rig("killed-load", wait=False) as r:
            with pytest.raises(StartupFailed, match="SIGKILL") as caught:
                await asyncio.wait_for(r.running, LIMIT)
            assert not caught.value.permanent
            assert r.value("worker_restarts_total") == supervisor_module.FIRST_LOADS - 1

    asyncio.run(scenario())


def test_a_killed_worker_fails_its_requests_and_is_replaced():
    async def scenario():
        async with rig() as r:
            first_pid = r.pid
            doomed = []
            for first in (STALL, DIE):
                doomed.append(r.submit([first, 7], 50))
                assert len((await anext(doomed[-1])).token_ids) == 1
            for stream in doomed:
                with pytest.raises(GenerationFailed, match="killed by SIGKILL"):
                    await anext(stream)
            await until(lambda: r.client.info is not None and r.pid != first_pid)
            assert not exists(first_pid)
            assert tokens_of(await collect(r.submit([1, 1], 2))) == [2, 3]
            assert r.value("worker_restarts_total") == 1
            assert r.value("requests_total", finish_reason="error") == 2

    asyncio.run(scenario())


def test_between_two_workers_clients_are_told_when_to_come_back():
    async def scenario():
        async with rig(first_backoff=30.0) as r:
            os.kill(r.pid, signal.SIGKILL)
            await until(lambda: not r.client.alive)
            with pytest.raises(Unavailable, match="restarting") as caught:
                r.submit([1])
            assert 1 <= caught.value.retry_after <= 60
            assert r.value("model_ready") == 0
            # stop() does not wait for the back-off to pass.
            r.supervisor.stop()
            await asyncio.wait_for(r.running, LIMIT / 3)

    asyncio.run(scenario())


def test_a_worker_that_cannot_be_spawned_ends_the_start():
    async def scenario():
        supervisor = Supervisor(
            WorkerClient(Metrics().for_model("model"), 1),
            WorkerConfig("model", "", ""),
            ("/no/such/program",),
        )
        with pytest.raises(StartupFailed, match=r"could not be run: .*No such file"):
            await supervisor.run()

    asyncio.run(scenario())


def test_after_one_success_failing_loads_are_retried_with_growing_pauses(tmp_path, caplog):
    async def scenario():
        async with rig(f"once:{tmp_path / 'marker'}:load-error") as r:
            os.kill(r.pid, signal.SIGKILL)
            await until(lambda: len(pauses()) >= 4)
            assert not r.running.done()

    def pauses() -> list[float]:
        return [record.args[1] for record in caplog.records if record.name == "quire.supervisor"]

    asyncio.run(scenario())
    assert pauses()[:4] == [0.01, 0.02, 0.04, 0.08]
    assert "frobnicator" in caplog.text


def test_the_pause_has_a_ceiling_and_a_healthy_worker_resets_it(monkeypatch, caplog):
    monkeypatch.setattr(supervisor_module, "MAX_BACKOFF", 0.02)
    pauses = []

    async def kill_four_times():
        async with rig() as r:
            for _ in range(4):
                pid = r.pid
                os.kill(pid, signal.SIGKILL)
                await until(lambda pid=pid: r.client.info is not None and r.pid != pid)
        pauses.extend(rec.args[1] for rec in caplog.records if rec.name == "quire.supervisor")

    asyncio.run(kill_four_times())
    assert pauses == [0.01, 0.02, 0.02, 0.02]
    caplog.clear()
    pauses.clear()
    monkeypatch.setattr(supervisor_module, "HEALTHY_AFTER", 0.0)
    asyncio.run(kill_four_times())
    assert pauses == [0.01, 0.01, 0.01, 0.01]


def test_a_broken_frame_ends_the_worker(caplog):
    async def scenario():
        async with rig("garbage", first_backoff=LIMIT, wait=False) as r:
            await until(lambda: "broken frame" in caplog.text)
            assert not exists(r.pid)

    asyncio.run(scenario())


def test_drain_lets_running_requests_finish_and_refuses_new_ones():
    async def scenario():
        async with rig() as r:
            stream = r.submit([5], 200)
            await anext(stream)
            draining = asyncio.create_task(r.supervisor.drain(LIMIT))
            await until(lambda: r.client.state is WorkerState.DRAINING)
            with pytest.raises(Unavailable, match="shutting down"):
                r.submit([1])
            rest = await collect(stream)
            assert rest[-1].finish_reason == "length"
            await draining
            r.supervisor.stop()
            await asyncio.wait_for(r.running, LIMIT)
            assert r.supervisor._process.returncode == 0

    asyncio.run(scenario())


def test_drain_cuts_off_what_does_not_finish():
    async def scenario():
        async with rig() as r:
            stream = r.submit([STALL])
            await anext(stream)
            await r.supervisor.drain(0.05)
            with pytest.raises(GenerationFailed, match="shutting down"):
                await anext(stream)

    asyncio.run(scenario())


def test_a_worker_that_dies_while_draining_is_not_replaced():
    async def scenario():
        async with rig(first_backoff=0.0) as r:
            stream = r.submit([STALL])
            await anext(stream)
            draining = asyncio.create_task(r.supervisor.drain(LIMIT))
            await until(lambda: r.client.state is WorkerState.DRAINING)
            pid = r.pid
            os.kill(pid, signal.SIGKILL)
            await draining
            with pytest.raises(GenerationFailed):
                await anext(stream)
            await asyncio.wait_for(r.running, LIMIT)
            assert r.pid == pid

    asyncio.run(scenario())


def test_a_worker_that_ignores_shutdown_is_killed(monkeypatch):
    monkeypatch.setattr(supervisor_module, "LEAVE_TIMEOUT", 0.05)

    async def scenario():
        async with rig("deaf") as r:
            r.supervisor.stop()
            await asyncio.wait_for(r.running, LIMIT)
            assert r.supervisor._process.returncode == -signal.SIGKILL

    asyncio.run(scenario())


def test_stop_while_loading():
    async def scenario():
        async with rig("hang-load", wait=False) as r:
            await until(lambda: bool(r.progress))
            pid = r.pid
            r.supervisor.stop()
            await asyncio.wait_for(r.running, LIMIT)
            assert not exists(pid)

    asyncio.run(scenario())


def environment_of(pid: int) -> list[str]:
    return subprocess.run(
        ["ps", "-E" if sys.platform == "darwin" else "e", "-ww", "-o", "args=", "-p", str(pid)],
        capture_output=True,
        text=True,
    ).stdout.split()


def test_sockets_and_temporary_files_of_a_worker_are_private_and_go_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    async def scenario():
        async with rig("hang-load", wait=False) as r:
            await until(lambda: bool(r.progress))
            (base,) = tmp_path.iterdir()
            assert base.stat().st_mode & 0o777 == 0o700
            [folder] = [entry for entry in base.iterdir() if entry.name != "mlx"]
            assert folder.stat().st_mode & 0o777 == 0o700
            assert f"TMPDIR={folder}" in environment_of(r.pid)
        assert [entry.name for entry in base.iterdir()] == ["mlx"]

    asyncio.run(scenario())


def test_a_long_temporary_folder_does_not_matter(tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))

    async def scenario():
        async with rig() as r:
            assert len(tokens_of(await collect(r.submit([1])))) == 5

    asyncio.run(scenario())
    assert [path for path in folder.rglob("*") if path.name != "mlx"] == [*folder.iterdir()]


def test_the_worker_does_not_outlive_a_killed_parent(tmp_path):
    script = textwrap.dedent(
        """
        import asyncio, sys
        from worker_harness import rig

        async def main():
            async with rig() as r:
                print(r.pid, flush=True)
                await asyncio.sleep(3600)

        asyncio.run(main())
        """
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TMPDIR": str(tmp_path)},
    )
    try:
        worker = int(parent.stdout.readline())
        assert exists(worker)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    deadline = time.monotonic() + LIMIT
    while exists(worker):
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.01)
