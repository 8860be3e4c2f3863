"""Several models in one server: loaded when asked for, unloaded when nobody needs them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import pytest
from fake_worker import STALL
from test_serve_command import LIMIT, SCRIPT, Server, free_port, gone, model, until  # noqa: F401

ADMIN = {"Authorization": "Bearer sk-admin"}


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory) -> Path:  # noqa: F811
    root = tmp_path_factory.mktemp("fleet")
    for name in "abc":
        shutil.copytree(model, root / name)
    return root


def tables(folders: Path, **more: str) -> str:
    return "\n".join(
        f'[models.{name}]\nmodel = "{folders / name}"\n{more.get(name, "")}' for name in "abc"
    )


@contextlib.contextmanager
def fleet(tmp_path: Path, config: str, mode: str = "ok") -> Iterator[Server]:
    file, log, port = tmp_path / "quire.toml", tmp_path / "log", free_port()
    file.write_text(config)
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [
                *(sys.executable, SCRIPT, mode, "--config", file, "--port", str(port)),
                *("--admin-key", "sk-admin"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    server = Server(process, port, log)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(ConnectionRefusedError):
            return server.get("/ready") == 200
        return False

    try:
        until(ready)
        yield server
    finally:
        process.kill()
        process.wait()


def complete(server: Server, name: str, prompt: list[int] | None = None, **fields: object):
    body = {"model": name, "prompt": prompt or [65], "max_tokens": 2, **fields}
    return server.request("POST", "/v1/completions", body, **ADMIN)


def answer(server: Server, name: str) -> int:
    with complete(server, name) as response:
        response.read()
        return response.status


def admin(server: Server, what: str, name: str) -> tuple[int, dict]:
    with server.request("POST", f"/v1/models/{what}", {"model": name}, **ADMIN) as response:
        return response.status, json.load(response)


def loaded(server: Server) -> set[str]:
    with server.request("GET", "/metrics", **ADMIN) as response:
        lines = response.read().decode().splitlines()
    return {name for name in "abc" if f'quire_model_loaded{{model="{name}"}} 1.0' in lines}


def workers(server: Server) -> list[int]:
    rows = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(server.process.pid)],
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    return [int(row.split()[0]) for row in rows if "fake_worker" in row]


def test_models_are_loaded_when_they_are_asked_for(folders, tmp_path):
    with fleet(tmp_path, tables(folders)) as server:
        assert loaded(server) == {"a"}
        assert len(workers(server)) == 1
        assert answer(server, "b") == 200
        assert loaded(server) == {"a", "b"}
        assert len(workers(server)) == 2
        assert answer(server, "a") == 200
        assert answer(server, "none") == 404
        with server.request("GET", "/v1/models", **ADMIN) as response:
            assert [card["id"] for card in json.load(response)["data"]] == ["a", "b", "c"]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT) == 0


def test_the_one_used_longest_ago_makes_room(folders, tmp_path):
    with fleet(tmp_path, "max_loaded_models = 2\n" + tables(folders)) as server:
        assert answer(server, "b") == 200
        assert answer(server, "a") == 200
        assert answer(server, "c") == 200
        assert loaded(server) == {"a", "c"}
        assert len(workers(server)) == 2


def test_a_pinned_model_stays(folders, tmp_path):
    config = "max_loaded_models = 2\n" + tables(folders, a="pinned = true")
    with fleet(tmp_path, config) as server:
        for name in ("b", "c", "b"):
            assert answer(server, name) == 200
            assert loaded(server) == {"a", name}


def test_a_model_in_use_stays_until_its_request_ends(folders, tmp_path):
    with fleet(tmp_path, "max_loaded_models = 1\n" + tables(folders)) as server:
        with complete(server, "a", [STALL], max_tokens=9, stream=True) as running:
            running.readline()
            with complete(server, "b") as refused:
                assert refused.status == 503
                assert int(refused.headers["Retry-After"]) >= 1
                assert "no room for b" in json.load(refused)["error"]["message"]
            status, error = admin(server, "unload", "a")
            assert (status, error["error"]["code"]) == (409, "model_in_use")
            assert loaded(server) == {"a"}
        until(lambda: answer(server, "b") == 200)
        assert loaded(server) == {"b"}


def test_memory_asks_for_room(folders, tmp_path):
    """What the workers say they take adds up to more than this machine has."""
    config = tables(folders, a='kv_cache_memory = "500TiB"')
    with fleet(tmp_path, config) as server:
        assert answer(server, "b") == 200
        assert loaded(server) == {"b"}
        assert answer(server, "c") == 200
        assert loaded(server) == {"b", "c"}


def test_nobody_waits_for_a_model_that_nobody_uses(folders, tmp_path):
    config = "model_idle_ttl = 1\n" + tables(folders, a="pinned = true")
    with fleet(tmp_path, config) as server:
        with complete(server, "b", [STALL], max_tokens=9, stream=True) as running:
            running.readline()
            [worker] = [pid for pid in workers(server) if pid != workers(server)[0]]
        until(lambda: loaded(server) == {"a"})
        until(lambda: gone(worker))
        assert answer(server, "b") == 200


def test_one_model_alone_leaves_when_nobody_uses_it(folders, tmp_path):
    with fleet(tmp_path, f'model = "{folders / "a"}"\nmodel_idle_ttl = 1\n') as server:
        [worker] = workers(server)
        until(lambda: gone(worker))
        assert (server.get("/health"), server.get("/ready")) == (200, 200)
        assert answer(server, "a") == 200
        assert len(workers(server)) == 1


def test_a_model_on_its_way_out_is_waited_for(folders, tmp_path):
    """Its worker does not leave by itself, so that it takes a while."""
    with fleet(tmp_path, "max_loaded_models = 1\n" + tables(folders), "deaf") as server:
        [worker] = workers(server)
        with ThreadPoolExecutor(1) as thread:
            unloading = thread.submit(admin, server, "unload", "a")
            until(lambda: "unloading a" in server.log.read_text())
            assert not gone(worker)
            assert answer(server, "b") == 200
            assert unloading.result()[0] == 200
        assert gone(worker)
        assert loaded(server) == {"b"}


def heaps_of_threads(pid: int) -> int:
    """glibc's: mappings at a multiple of 64 MiB, whose rest, up to 64 MiB, is reserved behind."""
    whole = 64 << 20
    count, start = 0, 0
    for row in Path(f"/proc/{pid}/maps").read_text().splitlines():
        first, last = (int(address, 16) for address in row.split()[0].split("-"))
        rights, is_file = row.split()[1], len(row.split()) > 5
        if is_file:
            continue
        if rights == "rw-p" and first % whole == 0:
            start = first
        elif rights == "---p" and start and last == start + whole:
            count += 1
    return count


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_models_that_come_and_go_leave_nothing_in_heaps_of_threads(folders, tmp_path):
    """What one thread read and another drops would stay with the first, a little of each model."""
    with fleet(tmp_path, "max_loaded_models = 1\n" + tables(folders)) as server:
        for name in "bcabca":
            assert answer(server, name) == 200
        threads = len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))
        assert threads > 3
        assert heaps_of_threads(server.process.pid) == 0


def test_load_and_unload_by_hand(folders, tmp_path):
    with fleet(tmp_path, tables(folders)) as server:
        assert admin(server, "load", "c") == (200, {"id": "c", "state": "loaded"})
        assert loaded(server) == {"a", "c"}
        worker = workers(server)[-1]
        assert admin(server, "unload", "c") == (200, {"id": "c", "state": "unloaded"})
        assert gone(worker)
        assert admin(server, "unload", "c")[0] == 200
        assert admin(server, "load", "none")[0] == 404
        assert server.get("/ready") == 200
        assert answer(server, "c") == 200


def test_requests_that_arrive_together_load_a_model_once(folders, tmp_path):
    with fleet(tmp_path, tables(folders)) as server:
        statuses: list[int] = []
        threads = [
            threading.Thread(target=lambda: statuses.append(answer(server, "b"))) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 8
        assert len(workers(server)) == 2


def test_the_first_model_is_waited_for_when_it_comes_back(folders, tmp_path):
    with fleet(tmp_path, tables(folders)) as server:
        assert admin(server, "unload", "a")[0] == 200
        assert server.get("/ready") == 200
        with ThreadPoolExecutor(8) as threads:
            assert [*threads.map(lambda _: answer(server, "a"), range(8))] == [200] * 8


def test_a_load_that_somebody_asks_for_is_no_matter_to_others(folders, tmp_path):
    marker = tmp_path / "marker"
    with fleet(tmp_path, tables(folders), f"once:{marker}:hang-load") as server:
        marker.touch()
        headers = {"Content-Type": "application/json", **ADMIN}
        with contextlib.closing(HTTPConnection("127.0.0.1", server.port, timeout=LIMIT)) as client:
            client.request("POST", "/v1/completions", '{"model": "b", "prompt": "x"}', headers)
            until(lambda: len(workers(server)) == 2)
            assert server.get("/ready") == 200
            assert answer(server, "a") == 200
            assert admin(server, "unload", "b")[0] == 409
        # Who has left does not hold it.
        until(lambda: admin(server, "unload", "b")[0] == 200)


def test_a_model_that_cannot_be_loaded_harms_no_other(folders, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folders / "b", broken)
    (broken / "config.json").write_text("{")
    config = tables(folders) + f'\n[models.d]\nmodel = "{broken}"\n'
    with fleet(tmp_path, config) as server:
        for _ in range(2):
            with complete(server, "d") as response:
                assert response.status == 503
                error = json.load(response)["error"]
                assert error["code"] == "model_not_loaded"
                assert "not valid JSON" in error["message"]
        assert answer(server, "a") == 200
        assert server.get("/ready") == 200
        until(lambda: server.log.read_text().count(" ERROR ") > 0)
    errors = server.log.read_text().count(" ERROR ")
    assert errors == 1, "not tried again for each request"


def test_aliases_and_presets(folders, tmp_path):
    more = 'aliases = ["gpt"]\n[models.b.presets.hot]\ntemperature = 1.5\n'
    with fleet(tmp_path, tables(folders, b=more)) as server:
        for name in ("gpt", "b:hot", "gpt:hot"):
            with complete(server, name) as response:
                assert json.load(response)["model"] == "b"
        assert len(workers(server)) == 2


def test_a_killed_worker_of_one_model_is_no_matter_to_another(folders, tmp_path):
    with fleet(tmp_path, tables(folders)) as server:
        assert answer(server, "b") == 200
        first, second = workers(server)
        with complete(server, "a", [STALL], max_tokens=9, stream=True) as running:
            running.readline()
            os.kill(second, signal.SIGKILL)
            until(lambda: len(workers(server)) == 2 and second not in workers(server))
            until(lambda: answer(server, "b") == 200)
            assert first in workers(server)


def test_a_model_that_must_be_there_ends_the_start(folders, tmp_path):
    (tmp_path / "quire.toml").write_text(
        tables(folders, b="pinned = true").replace(str(folders / "b"), str(tmp_path / "none"))
    )
    result = subprocess.run(
        [sys.executable, SCRIPT, "ok", "--config", tmp_path / "quire.toml", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert result.returncode == 2
    assert "no such folder" in result.stderr.splitlines()[-1]
