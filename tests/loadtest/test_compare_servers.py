from __future__ import annotations

import asyncio
import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from quire.loadtest import servers
from quire.loadtest.compare import compare, comparisons, identical_answers
from quire.loadtest.report import print_comparison
from quire.loadtest.results import (
    ComparedRun,
    CompareResult,
    LoadResult,
    StallResult,
    load_result,
)
from quire.loadtest.serve import LoadOptions
from quire.loadtest.servers import ServerSpec, mlx_lm_spec, quire_spec, running
from quire.loadtest.stall import StallOptions
from quire.loadtest.workloads import WorkloadSpec

SCRIPT = Path(__file__).with_name("scripted_server.py")
LOAD = LoadOptions(WorkloadSpec(requests=6, max_tokens=4), clients=2)


def _spec(folder: Path, mode: str = "good", name: str | None = None) -> ServerSpec:
    return ServerSpec(name or mode, (sys.executable, str(SCRIPT), str(folder), mode))


def _compare(specs: list[ServerSpec], rounds: int = 1, **options: float) -> CompareResult:
    return asyncio.run(compare(specs, [LOAD], rounds, LOAD, **options))


def _running(pid: int) -> bool:
    """Zombies do not count: who reaps an orphan is the system's business."""
    command = ["ps", "-o", "stat=", "-p", str(pid)]
    state = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return state != "" and not state.startswith("Z")


def _assert_all_ended(folder: Path) -> None:
    pids = [int(path.name) for path in folder.iterdir()]
    assert pids
    deadline = time.monotonic() + 10
    while any(map(_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [pid for pid in pids if _running(pid)]


def test_servers_alternate_with_the_same_seed_in_one_round(tmp_path: Path) -> None:
    heard: list[ComparedRun] = []
    specs = [_spec(tmp_path, name="a"), _spec(tmp_path, name="b")]

    def hear(so_far: CompareResult) -> None:
        heard.append(so_far.runs[-1])

    result = asyncio.run(compare(specs, [LOAD], 2, LOAD, on_run=hear))
    assert [(run.server, run.round, run.seed) for run in result.runs] == [
        ("a", 0, 0),
        ("b", 0, 0),
        ("a", 1, 1),
        ("b", 1, 1),
    ]
    assert heard == result.runs
    assert all(run.failure is None for run in result.runs)
    # One server process and one worker per run: each run had a fresh server.
    assert len(list(tmp_path.iterdir())) == 8
    _assert_all_ended(tmp_path)
    assert identical_answers(result, "uniform") == (12, 12)
    rates = {c.label: c for c in comparisons(result, "uniform")}["output tokens/s"]
    assert rates.ratio is not None
    assert rates.medians["a"] == pytest.approx(rates.ratio * (rates.medians["b"] or 0))


def test_it_is_said_when_the_servers_were_sent_different_prompts(tmp_path: Path) -> None:
    def said(a: str, b: str) -> str:
        result = _compare([_spec(tmp_path, a, "a"), _spec(tmp_path, b, "b")])
        console = Console(file=io.StringIO(), width=100)
        print_comparison(console, result)
        return console.file.getvalue()  # type: ignore[attr-defined]

    assert "of 6 of 6 prompts the servers count different numbers" in said("good", "thinks")
    assert "warning" not in said("good", "good")


def test_a_server_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    result = _compare([_spec(tmp_path, "dies"), _spec(tmp_path)])
    dead, good = result.runs
    assert dead.failure == "dies exited with code 7: out of memory"
    assert isinstance(dead.result, LoadResult)  # what was measured until then is kept
    assert dead.result.summary.requests_completed < 6
    assert good.failure is None
    rates = comparisons(result, "uniform")[0]
    assert rates.medians["dies"] is None
    assert rates.ratio is None
    _assert_all_ended(tmp_path)


def test_what_servers_print_is_kept_on_request(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (tmp_path / "pids").mkdir()
    specs = [_spec(tmp_path / "pids", "crashes"), _spec(tmp_path / "pids", "dies")]
    asyncio.run(compare(specs, [LOAD], 2, LOAD, logs=logs))
    kept = {path.name: path.read_text() for path in logs.iterdir()}
    assert kept == {
        "uniform-1-crashes.log": "no memory for the weights\n",
        "uniform-2-crashes.log": "no memory for the weights\n",
        "uniform-1-dies.log": "out of memory\n",
        "uniform-2-dies.log": "out of memory\n",
    }


def test_a_server_that_never_starts_is_reported(tmp_path: Path) -> None:
    (run,) = _compare([_spec(tmp_path, "crashes")]).runs
    assert run.result is None
    assert run.failure == "crashes exited with code 1: no memory for the weights"


def test_a_server_that_refuses_is_not_waited_for(tmp_path: Path) -> None:
    (run,) = _compare([_spec(tmp_path, "refuses")], ready_seconds=600).runs
    assert run.failure is not None
    assert "404" in run.failure
    assert "no such model" in run.failure
    _assert_all_ended(tmp_path)


def test_a_server_that_is_never_ready_is_given_up(tmp_path: Path) -> None:
    (run,) = _compare([_spec(tmp_path, "hangs")], ready_seconds=0.5).runs
    assert run.failure is not None
    assert "hangs not ready in 0.5 s" in run.failure
    _assert_all_ended(tmp_path)


def test_a_loading_server_is_waited_for(tmp_path: Path) -> None:
    (run,) = _compare([_spec(tmp_path, "loads")]).runs
    assert run.failure is None
    assert isinstance(run.result, LoadResult)
    assert run.result.summary.requests_completed == 6


def test_a_server_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "_STOP_SECONDS", 0.2)
    (run,) = _compare([_spec(tmp_path, "stubborn")]).runs
    assert run.failure is None
    _assert_all_ended(tmp_path)


def test_servers_are_stopped_when_the_measurement_fails(tmp_path: Path) -> None:
    async def measure() -> None:
        with running(_spec(tmp_path)) as server:
            await server.wait_ready(LOAD, 60)
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        asyncio.run(measure())
    _assert_all_ended(tmp_path)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_an_interrupted_comparison_leaves_no_server(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    # The real command, with the scripted server in both places.
    program = f"""
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # CI may run us with SIGINT ignored
from quire.loadtest import command
from quire.loadtest.servers import ServerSpec
spec = ServerSpec("x", (sys.executable, {str(SCRIPT)!r}, {str(tmp_path / "pids")!r}, "hangs"))
command.quire_spec = command.mlx_lm_spec = lambda *args: spec
import argparse
parser = argparse.ArgumentParser()
command.add_arguments(parser)
try:
    code = command.run(parser.parse_args(["compare", "--model", {str(tmp_path)!r}]))
except KeyboardInterrupt:
    code = 130
sys.exit(code)
"""
    (tmp_path / "pids").mkdir()
    (tmp_path / "config.json").write_text("{}")
    process = subprocess.Popen([sys.executable, "-c", program])
    while len(list((tmp_path / "pids").iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == code
    _assert_all_ended(tmp_path / "pids")


def test_runs_before_an_interruption_are_saved(tmp_path: Path) -> None:
    program = f"""
import argparse, sys
from quire.loadtest import command
from quire.loadtest.servers import ServerSpec
def spec(mode):
    return ServerSpec(mode, (sys.executable, {str(SCRIPT)!r}, {str(tmp_path / "pids")!r}, mode))
command.quire_spec, command.mlx_lm_spec = lambda *args: spec("good"), lambda *args: spec("hangs")
parser = argparse.ArgumentParser()
command.add_arguments(parser)
sys.exit(command.run(parser.parse_args(sys.argv[1:])))
"""
    (tmp_path / "pids").mkdir()
    (tmp_path / "config.json").write_text("{}")
    out = tmp_path / "new" / "x.json"
    options = f"--workloads uniform --requests 3 --max-tokens 2 --model {tmp_path} --out {out}"
    process = subprocess.Popen([sys.executable, "-c", program, "compare", *options.split()])
    while len(list((tmp_path / "pids").iterdir())) < 4:  # the second server runs
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    _assert_all_ended(tmp_path / "pids")
    saved = load_result(out)
    assert isinstance(saved, CompareResult)
    assert [(run.server, run.failure) for run in saved.runs] == [("good", None)]
    assert [setup.name for setup in saved.servers] == ["good", "hangs"]


def test_the_stall_of_running_streams(tmp_path: Path) -> None:
    stall = StallOptions(streams=3, prompt_chars=200, max_tokens=5000, settle_chunks=5)
    result = asyncio.run(compare([_spec(tmp_path)], [stall], 1, LOAD))
    (run,) = result.runs
    assert (run.workload, run.failure) == ("stall", None)
    assert isinstance(run.result, StallResult)
    assert len(run.result.longest_gap_by_stream_ms) == 3
    assert run.result.longest_gap_ms == max(run.result.longest_gap_by_stream_ms) > 0
    assert run.result.gap_before_ms.count >= 3 * 4
    assert len(run.result.records) == 4
    _assert_all_ended(tmp_path)


def test_streams_too_short_to_measure_a_stall_are_an_error(tmp_path: Path) -> None:
    stall = StallOptions(streams=2, max_tokens=3)
    (run,) = asyncio.run(compare([_spec(tmp_path)], [stall], 1, LOAD)).runs
    assert run.failure is not None
    assert "ended too early" in run.failure


def test_rounds_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--rounds"):
        _compare([_spec(tmp_path)], rounds=0)


def test_both_servers_are_started_for_the_load() -> None:
    quire = quire_spec(Path("m"), 100, ["--device", "cpu"], "libx.so")
    assert "--max-num-seqs 100" in quire.setup.command
    assert quire.setup.command.endswith("--device cpu")
    assert quire.setup.command.startswith("python -m quire.serve.cli serve --model m ")
    peer = mlx_lm_spec(Path("m"), 100, [], "libx.so")
    assert "--decode-concurrency 100 --prompt-concurrency 100" in peer.setup.command
    assert "--chat-template-kwargs enable_thinking=false" in quire.setup.command
    assert "--chat-template-args '{\"enable_thinking\": false}'" in peer.setup.command
    assert quire.setup.preload == peer.setup.preload == "libx.so"
