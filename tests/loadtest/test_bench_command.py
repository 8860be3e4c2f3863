from __future__ import annotations

import argparse
import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from fake_chat_server import Answer, Request, complete_answer, respond, serving

from quire.loadtest import command, environment
from quire.loadtest.result_file import ResultError
from quire.loadtest.results import LoadResult, load_result


def _run(*argv: str) -> int:
    parser = argparse.ArgumentParser(prog="quire bench")
    command.add_arguments(parser)
    return command.run(parser.parse_args(argv))


class Background:
    """A scripted server on a thread, for commands that run an event loop themselves."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._serve()])
        self._thread.start()
        assert self._ready.wait(10)

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        async with serving(self._answer) as server:
            self.url = f"http://127.0.0.1:{server.base.port}/v1"
            self._ready.set()
            await self._stop.wait()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()


async def _some_fail(request: Request, writer: asyncio.StreamWriter) -> None:
    long = request.body["max_tokens"] > 1
    writer.write(respond(503, {"error": "[queue] full"}) if long else complete_answer())


async def _good(request: Request, writer: asyncio.StreamWriter) -> None:
    writer.write(complete_answer())


@pytest.fixture
def server() -> Iterator[Background]:
    background = Background(_good)
    yield background
    background.close()


@pytest.fixture
def failing_server() -> Iterator[Background]:
    background = Background(_some_fail)
    yield background
    background.close()


def test_serve_prints_figures_and_writes_what_can_be_read_back(
    server: Background, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "x.json"
    arguments = ("--workload", "shared", "--requests", "5", "--clients", "2", "--out", str(out))
    assert _run("serve", "--url", server.url, *arguments) == 0
    printed = capsys.readouterr().out
    assert "shared: 5 of 5 requests, 2 clients" in printed
    assert "output tokens/s (from usage)" in printed
    assert "50 prompt tokens, of them cached: 20" in printed
    assert "time to first token" in printed
    result = load_result(out)
    assert isinstance(result, LoadResult)
    assert len(result.records) == 5
    assert result.workload.name == "shared"
    assert result.environment.cpu_count >= 1
    assert "mlx" in result.environment.packages
    assert result.command


def test_failed_requests_are_shown_and_change_the_exit_code(
    failing_server: Background, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("serve", "--url", failing_server.url, "--requests", "3", "--warmup", "0") == 1
    printed = capsys.readouterr().out
    assert "errors: 3 x http 503" in printed
    assert "first http 503: [queue] full" in printed


def test_no_server_is_one_clear_line(closed_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("serve", "--url", f"http://127.0.0.1:{closed_port}") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no server answers at 127.0.0.1:")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "--url", "localhost:8000"], "--url must look like"),
        (["serve", "--api-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE is not set"),
        (["compare", "--workloads", "uniform,odd"], "'odd' is none of"),
        (["compare", "--requests", "0"], "--requests"),
        (["compare", "--clients", "0"], "--clients"),
        (["compare", "--model", "/no/such/folder"], "no config.json"),
        (["make-model", "unused", "--vocab", "3"], "--vocab"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(*argv) == 2
    assert message in capsys.readouterr().err


def test_make_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = "--hidden 32 --layers 1 --heads 2 --kv-heads 1 --head-dim 16 --vocab 260"
    assert _run("make-model", str(tmp_path / "m"), *shape.split()) == 0
    assert "M parameters, float32" in capsys.readouterr().out
    assert json.loads((tmp_path / "m" / "config.json").read_text())["hidden_size"] == 32


def test_make_model_from_a_named_shape(tmp_path: Path) -> None:
    changes = "--shape qwen3-8b --hidden 32 --layers 1 --heads 2 --kv-heads 1 --head-dim 16"
    assert _run("make-model", str(tmp_path), *changes.split(), "--vocab", "260") == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["torch_dtype"]) == ("qwen3", "bfloat16")
    assert (config["hidden_size"], config["intermediate_size"]) == (32, 12288)


def test_results_name_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.1'\necho 'NVIDIA H200, 580.1'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    environment._nvidia_gpus.cache_clear()
    assert environment.describe().gpus == ["NVIDIA H200, 580.1"] * 2
    driver.write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    environment._nvidia_gpus.cache_clear()
    assert environment.describe().gpus == []
    environment._nvidia_gpus.cache_clear()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "not a load test result"),
        (b"\xff", "not a load test result"),
        (msgspec.json.encode({"kind": "load", "format_version": 99}), "format version 99"),
        (msgspec.json.encode({"kind": "odd", "format_version": 1}), "not a load test result"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ResultError, match=message):
        load_result(path)
