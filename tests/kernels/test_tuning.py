"""Measuring: the faster variant wins, a wrong or hardly faster one does not, and once is enough."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from quire.kernels.choice import record as records
from quire.kernels.choice import timing, tuning
from quire.kernels.choice.problem import Problem
from quire.kernels.choice.record import Record, Timing, current_key, load_record, save_record
from quire.kernels.choice.selection import Selector, Why
from quire.kernels.choice.sizes import typical_sizes
from quire.kernels.choice.timing import Samples, is_faster
from quire.kernels.choice.tuning import (
    Candidate,
    Task,
    candidates,
    find_fastest,
    tasks_for,
    tune,
    tuned_operations,
)
from quire.kernels.delta_rule_spec import DELTA_RULE, DeltaProblem, DeltaShape, DeltaVariant
from quire.kernels.kv_write_spec import KV_WRITE, WriteShape
from quire.kernels.paged_decode_spec import PAGED_DECODE, DecodeShape, DecodeVariant
from quire.kernels.prompt_attention_spec import PROMPT_ATTENTION, PromptShape, PromptVariant
from quire.kernels.quantized_matmul_spec import QUANTIZED_MATMUL, MatmulShape, QuantizedVariant

PROMPT = Task(PROMPT_ATTENTION, PromptShape(8, 8, 2, 1, 32, 32, 16), "float32")
TILES = Candidate(PromptVariant.SDPA_TILED, {})
SDPA = Candidate(PromptVariant.GATHER_SDPA, {})


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
    assert is_faster(challenger, champion, 0.02) is wins


def test_one_slow_run_does_not_decide() -> None:
    steady, disturbed = samples(1.0, 0.01).values, (*samples(0.9, 0.01).values[:-1], 50.0)
    assert is_faster(Samples(disturbed), Samples(steady), 0.02)


Run = Callable[[Any, Any], Sequence[mx.array]]


class Clock:
    """Time that passes only where a variant says so."""

    def __init__(self) -> None:
        self.now = 0

    def perf_counter_ns(self) -> int:
        self.now += 1
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)

    def sample(chain: Any, function: Any, inputs: Sequence[Problem], calls: int) -> float:
        """What a call takes passes as its graph is built, which is no part of a chain's time."""
        start = clock.now
        for call in range(calls):
            function(inputs[call % len(inputs)])
        return (clock.now - start) / 1e3 / calls

    monkeypatch.setattr(timing, "_chained", sample)
    return clock


class One(Problem):
    num_bytes = 1

    def expected(self) -> list[npt.NDArray[np.float64]]:
        return [np.ones(1)]

    def chained(self, result: Sequence[mx.array]) -> One:
        return self


def with_variants(task: Task, runs: Mapping[Any, Run]) -> Task:
    """Variants computed by ``runs``."""
    variants = {name: replace(task.spec.variants[name], run=run) for name, run in runs.items()}
    spec = replace(task.spec, variants=variants, problem=lambda *args: One())
    return task._replace(spec=spec)


def fake_task(clock: Clock, work: Mapping[Any, int], value: Mapping[Any, float]) -> Task:
    """Variants that take the given microseconds and return the given numbers."""

    def run(name: Any) -> list[mx.array]:
        clock.now += work[name] * 1000
        return [mx.array([value[name]]) * 1.0]

    runs = {name: lambda problem, settings, name=name: run(name) for name in work}
    return with_variants(PROMPT, runs)


def test_less_work_wins(clock: Clock) -> None:
    task = fake_task(
        clock, {TILES.variant: 160, SDPA.variant: 8}, {TILES.variant: 1.0, SDPA.variant: 1.0}
    )
    timing = find_fastest("cpu", task, [TILES, SDPA])
    assert timing.variant == "gather_sdpa"
    assert 0 < timing.time < timing.default_time
    timing = find_fastest("cpu", task, [SDPA, TILES])
    assert timing.variant == "gather_sdpa"
    assert timing.time == timing.default_time


def test_what_disagrees_cannot_win(caplog: pytest.LogCaptureFixture, clock: Clock) -> None:
    work, value = {TILES.variant: 160, SDPA.variant: 8}, {TILES.variant: 1.0, SDPA.variant: 1.001}
    timing = find_fastest("cpu", fake_task(clock, work, value), [TILES, SDPA])
    assert timing.variant == "sdpa_tiled"
    (message,) = caplog.messages
    assert message.startswith("prompt_attention: gather_sdpa is off by 1.0e-03")


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_what_does_not_run_cannot_win(
    error: type[Exception], caplog: pytest.LogCaptureFixture, clock: Clock
) -> None:
    """A pipeline that refuses so many threads is a ValueError to Python."""

    def refuse(problem: Problem, settings: object) -> list[mx.array]:
        raise error("too many threads for its registers")

    def run(problem: Problem, settings: object) -> list[mx.array]:
        clock.now += 8000
        return [mx.ones((1,)) * 1.0]

    task = with_variants(PROMPT, {TILES.variant: run, SDPA.variant: refuse})
    assert find_fastest("cpu", task, [TILES, SDPA]).variant == "sdpa_tiled"
    (message,) = caplog.messages
    assert message.startswith("prompt_attention: gather_sdpa does not run: too many threads")


def test_the_winner_is_among_many(clock: Clock) -> None:
    """More candidates than finalists: screening must not lose the best."""
    work = {128 << i: 168 - 32 * i for i in range(6)}

    def run(problem: Problem, settings: Mapping[str, int]) -> list[mx.array]:
        clock.now += work[settings["split"]] * 1000
        return [mx.ones((1,)) * 1.0]

    found = [
        Candidate(DecodeVariant.PAGED_KERNEL, {"simdgroups": s, "unroll_keys": 4, "split": split})
        for split in work
        for s in (2, 4)
    ]
    task = Task(PAGED_DECODE, DecodeShape(1, 64, 1, 1, 64, 64, 16), "float32")
    task = with_variants(task, {DecodeVariant.PAGED_KERNEL: run})
    assert find_fastest("cpu", task, found).settings["split"] == 4096


def test_a_real_problem_is_measured_in_chains() -> None:
    timing = find_fastest("cpu", PROMPT, [TILES, SDPA])
    assert timing.variant in ("sdpa_tiled", "gather_sdpa")
    assert 0 < timing.time <= timing.default_time


def test_pools_are_measured_in_chains_over_many_sets_of_inputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "_SAMPLE_US", 1e9)  # chains are long, however slow the machine is

    def in_place(problem: DeltaProblem) -> list[mx.array]:
        y = problem.rows[0] + problem.fence
        return problem.written([y.swapaxes(0, 1)], y.flatten()[:1].astype(mx.int32))

    steps = DELTA_RULE.variants[DeltaVariant.STEPS].with_settings({})
    problems = [DeltaProblem(DeltaShape(4, 2, 1, 1, 32, 8), mx.float32, seed) for seed in range(3)]
    functions = {"in place": in_place, "steps": steps}
    times = timing.measure(functions, problems, 2, timing.chained)
    assert all(each.calls > len(problems) for each in times.values())


def test_the_default_comes_first_and_nothing_twice() -> None:
    chosen = Selector("cuda", None)
    shape = DecodeShape(4, 1000, 32, 8, 128, 128, 16)
    found = candidates(chosen, Task(PAGED_DECODE, shape, "bfloat16"))
    assert found[0] == Candidate(DecodeVariant.PAGED_KERNEL, {})
    assert len(found) == len({str(each) for each in found}) == 1 + 3 * 3 * 6
    # Whether pages are read in place is decided when a model is loaded.
    assert {each.variant for each in found} == {DecodeVariant.PAGED_KERNEL}
    matmul = Task(QUANTIZED_MATMUL, MatmulShape(8, 4096, 4096, 4, 64), "float32")
    found = candidates(chosen, matmul)
    assert found[0] == Candidate(QuantizedVariant.ROWS, {})
    assert Candidate(QuantizedVariant.ROWS, {"columns": 8, "simdgroups": 4, "depth": 1}) in found
    assert Candidate(QuantizedVariant.DEQUANTIZE, {}) in found


def test_only_what_is_unknown_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    known = PROMPT._replace(shape=PromptShape(500, 500, 2, 1, 32, 32, 16))
    alone = Task(KV_WRITE, WriteShape(4, 1, 8, 8, 8), "float32")
    bucket = known.bucket
    old = Timing("prompt_attention", bucket, "float32", "gather_sdpa", {}, 1.0, 2.0)
    record = Record(current_key("cpu"), timings=(old,))
    asked: list[Task] = []

    def fake_measure(device: str, task: Task, found: list[Candidate]) -> Timing:
        asked.append(task)
        name = found[0].variant.value
        return Timing(task.spec.name, task.bucket, task.dtype, name, {}, 3.0, 3.0)

    monkeypatch.setattr(tuning, "find_fastest", fake_measure)
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
    assert forced.timings_by_bucket()["prompt_attention", bucket, "float32"].variant == "sdpa_tiled"


@pytest.mark.parametrize("device", ["metal", "cuda", "cpu"])
def test_tasks_name_shapes_that_something_supports(device) -> None:
    chosen = Selector(device, None)
    tasks = list(tasks_for(typical_sizes(device), device, 16))
    assert {task.spec.name for task in tasks} == set(tuned_operations())
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
    choice = Selector("cpu", record).select(PROMPT_ATTENTION, shape, mx.float32)
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
        name = found[0].variant.value
        return Timing(task.spec.name, task.bucket, task.dtype, name, {}, 3.0, 3.0)

    monkeypatch.setattr(tuning, "save_record", save)
    monkeypatch.setattr(tuning, "find_fastest", fake_measure)
    other = PROMPT._replace(shape=PromptShape(500, 500, 2, 1, 32, 32, 16))
    with pytest.raises(KeyboardInterrupt):
        tune("cpu", Record(current_key("cpu")), [PROMPT, other])
    assert len(load_record("cpu").timings) == 1
