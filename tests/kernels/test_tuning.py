"""Measuring: the faster variant wins, a wrong or hardly faster one does not, and once is enough."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from quire.kernels.choice import record as records
from quire.kernels.choice import tuning
from quire.kernels.choice.manifest import load_manifest
from quire.kernels.choice.record import Record, Timing, current_key, load_record, save_record
from quire.kernels.choice.selection import Selector, Why
from quire.kernels.choice.shapes import (
    DecodeShape,
    MatmulShape,
    PromptShape,
    WriteShape,
    timing_bucket,
)
from quire.kernels.choice.tuning import (
    Candidate,
    Samples,
    Task,
    candidates,
    is_faster,
    measure,
    tune,
)
from quire.kernels.choice.tuning_tasks import tasks_for, tuned_operations, typical_sizes
from quire.kernels.probes.probe import Probe

PROMPT = Task("prompt_attention", PromptShape(8, 8, 2, 1, 32, 32, 16), "float32")
TILES, SDPA = Candidate("tiles", {}), Candidate("gather_sdpa", {})


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def samples(center: float, spread: float) -> Samples:
    return Samples(tuple(np.linspace(center - spread, center + spread, 25).tolist()))


@pytest.mark.parametrize(
    ("challenger", "champion", "wins"),
    [
        (samples(0.9, 0.01), samples(1.0, 0.01), True),
        (samples(1.1, 0.01), samples(1.0, 0.01), False),
        (samples(0.9, 0.4), samples(1.0, 0.4), False),  # within the noise
        (samples(0.99, 0.0), samples(1.0, 0.0), False),  # certain, and not worth it
        (samples(0.5, 0.4), samples(1.0, 0.4), True),
    ],
)
def test_a_challenger_must_beat_the_noise(
    challenger: Samples, champion: Samples, wins: bool
) -> None:
    assert is_faster(challenger, champion) is wins


def test_one_slow_run_does_not_decide() -> None:
    steady, disturbed = samples(1.0, 0.01).values, (*samples(0.9, 0.01).values[:-1], 50.0)
    assert is_faster(Samples(disturbed), Samples(steady))


class Clock:
    """Time that passes only where a variant says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-9
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tuning, "time", clock)
    return clock


def fake_probe(clock: Clock, work: Mapping[str, int], value: Mapping[str, float]) -> Probe:
    """Variants that take the given microseconds and return the given numbers."""

    def run(name: str) -> list[mx.array]:
        clock.now += work[name] * 1e-6
        return [mx.array([value[name]]) * 1.0]

    runs = {name: lambda settings, name=name: run(name) for name in work}
    return Probe(runs, lambda: [np.ones(1)], 1)


def measured(monkeypatch: pytest.MonkeyPatch, probe: Probe, found: list[Candidate]) -> Timing:
    monkeypatch.setattr(tuning, "make_probe", lambda *args, **options: probe)
    return measure("cpu", PROMPT, found)


def test_less_work_wins(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    probe = fake_probe(clock, {"tiles": 160, "gather_sdpa": 8}, {"tiles": 1.0, "gather_sdpa": 1.0})
    timing = measured(monkeypatch, probe, [TILES, SDPA])
    assert timing.variant == "gather_sdpa"
    assert 0 < timing.time < timing.default_time
    timing = measured(monkeypatch, probe, [SDPA, TILES])
    assert timing.variant == "gather_sdpa"
    assert timing.time == timing.default_time


def test_what_disagrees_cannot_win(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    probe = fake_probe(
        clock, {"tiles": 160, "gather_sdpa": 8}, {"tiles": 1.0, "gather_sdpa": 1.001}
    )
    timing = measured(monkeypatch, probe, [TILES, SDPA])
    assert timing.variant == "tiles"
    (message,) = caplog.messages
    assert message.startswith("prompt_attention: gather_sdpa is off by 1.0e-03")


def test_the_winner_is_among_many(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """More candidates than finalists: screening must not lose the best."""
    work = {128 << i: 168 - 32 * i for i in range(6)}

    def run(settings: Mapping[str, int]) -> list[mx.array]:
        clock.now += work[settings["split"]] * 1e-6
        return [mx.ones((1,)) * 1.0]

    probe = Probe({"pages": run}, lambda: [np.ones(1)], 1)
    monkeypatch.setattr(tuning, "make_probe", lambda *args, **options: probe)
    found = [
        Candidate("pages", {"simdgroups": s, "unroll_keys": 4, "split": split})
        for split in work
        for s in (2, 4)
    ]
    task = Task("paged_decode", DecodeShape(1, 64, 1, 1, 64, 64, 16), "float32")
    assert measure("cpu", task, found).settings["split"] == 4096


def test_the_default_comes_first_and_nothing_twice() -> None:
    chosen = Selector("cuda", load_manifest(), None)
    shape = DecodeShape(4, 1000, 32, 8, 128, 128, 16)
    found = candidates(chosen, Task("paged_decode", shape, "bfloat16"))
    assert found[0] == Candidate("pages", {})
    assert len(found) == len({str(each) for each in found}) == 1 + 3 * 3 * 6
    # Whether pages are read in place is decided when a model is loaded.
    assert {each.variant for each in found} == {"pages"}
    matmul = Task("quantized_matmul", MatmulShape(8, 4096, 4096, 4, 64), "float32")
    assert (
        found[0]
        != candidates(chosen, matmul)[0]
        == Candidate("rows", {"columns": 4, "simdgroups": 4, "depth": 2})
    )


def test_only_what_is_unknown_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    known = PROMPT._replace(shape=PromptShape(500, 500, 2, 1, 32, 32, 16))
    alone = Task("kv_write", WriteShape(4, 1, 8, 8, 8), "float32")
    bucket = timing_bucket(known.shape)
    old = Timing("prompt_attention", bucket, "float32", "gather_sdpa", {}, 1.0, 2.0)
    record = Record(current_key("cpu"), timings=(old,))
    asked: list[Task] = []

    def fake_measure(device: str, task: Task, found: list[Candidate]) -> Timing:
        asked.append(task)
        shape = timing_bucket(task.shape)
        return Timing(task.operation, shape, task.dtype, found[0].variant, {}, 3.0, 3.0)

    monkeypatch.setattr(tuning, "measure", fake_measure)
    # The second has one variant only; the last is of the same bucket as the first.
    same = PROMPT._replace(shape=PROMPT.shape._replace(rows=7, context=7))
    after = tune("cpu", record, [PROMPT, alone, known, same])
    assert asked == [PROMPT]
    assert load_record("cpu") == after
    tune("cpu", after, [PROMPT, alone, known, same])
    assert asked == [PROMPT]
    # What was tuned before is no default when it is measured again.
    forced = tune("cpu", after, [known], force=True)
    assert asked == [PROMPT, known]
    assert forced.timings_by_bucket()["prompt_attention", bucket, "float32"].variant == "tiles"


@pytest.mark.parametrize("device", ["metal", "cuda", "cpu"])
def test_tasks_name_shapes_that_something_supports(device) -> None:
    chosen = Selector(device, load_manifest(), None)
    tasks = tasks_for(typical_sizes(device), device, 16)
    assert {task.operation for task in tasks} == set(tuned_operations())
    for task in tasks:
        assert candidates(chosen, task)


CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 512,
    "dtype": "bfloat16",
}


def quire(*argv: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quire.serve.cli", *argv],
        capture_output=True,
        text=True,
        env=os.environ | environ,
    )


def test_the_command_measures_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    command = ("tune", "--device", "cpu", "--model", tmp_path, "--op", "prompt_attention")
    first = quire(*command)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("prompt_attention [rows ") for line in lines[:4])
    assert lines[4].startswith("Measured 4 shapes on ")
    records._text_hash.cache_clear()  # read anew, as the commands do
    record = load_record("cpu")
    assert len(record.timings) == 4
    assert all(t.time > 0 for t in record.timings)

    path = Path(lines[4].rpartition(": ")[2])
    before = path.read_bytes()
    second = quire(*command)
    assert second.returncode == 0
    assert second.stdout.startswith("Nothing to measure on ")
    assert path.read_bytes() == before

    shape = PromptShape(64, 64, 2, 1, 32, 32, 16)
    choice = Selector("cpu", load_manifest(), record).select("prompt_attention", shape, mx.float32)
    assert choice.why is Why.TUNED

    path.write_text("spoiled")
    third = quire(*command)
    assert third.returncode == 0
    assert f"ignoring {path}" in third.stderr
    assert len(load_record("cpu").timings) == 4


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    missing = quire("tune", "--device", "cpu", "--model", tmp_path)
    assert missing.returncode == 1
    assert missing.stderr.startswith("quire: error: cannot read sizes from ")
    # The second is chosen when a model is loaded: there is nothing to measure.
    for name in ("paged_encode", "swiglu"):
        unknown = quire("tune", "--device", "cpu", "--op", name)
        assert unknown.returncode == 2
        listed = "paged_decode, shared_context, prompt_attention, mixed_attention, "
        assert f"--op must be one of {listed}" in unknown.stderr
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "file").touch()
    command = ("tune", "--device", "cpu", "--model", tmp_path, "--op", "prompt_attention")
    unwritable = quire(*command, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert unwritable.returncode == 1
    assert "quire: error: " in unwritable.stderr
    assert "Traceback" not in unwritable.stderr


def test_save_before_the_next_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run keeps what it has measured."""
    saved: list[int] = []

    def save(record: Record) -> Path:
        saved.append(len(record.timings))
        return save_record(record)

    def fake_measure(device: str, task: Task, found: list[Candidate]) -> Timing:
        if saved:
            raise KeyboardInterrupt
        shape = timing_bucket(task.shape)
        return Timing(task.operation, shape, task.dtype, found[0].variant, {}, 3.0, 3.0)

    monkeypatch.setattr(tuning, "save_record", save)
    monkeypatch.setattr(tuning, "measure", fake_measure)
    other = PROMPT._replace(shape=PromptShape(500, 500, 2, 1, 32, 32, 16))
    with pytest.raises(KeyboardInterrupt):
        tune("cpu", Record(current_key("cpu")), [PROMPT, other])
    assert len(load_record("cpu").timings) == 1
