"""What a start runs and learns."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from model_zoo import build, reference_generate

from quire.engine.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.memory.budget import DeviceName
from quire.engine.messages import GenerateRequest, SamplingParams, WorkerConfig
from quire.engine.model.paged_model import PagedModel
from quire.engine.model.recurring import Recurring
from quire.engine.startup import start
from quire.engine.startup.start import start_engine
from quire.engine.startup.warm_up import (
    Load,
    make_ready,
    measure_activations,
    measure_mixed_tokens,
    run_everything,
)
from quire.engine.step.runner import HostStep, ModelRunner, Step
from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.gpu_kernel import not_run_but_noted
from quire.loadtest.small_model import shrunk, write_model


def make_engine(**options: int) -> Engine:
    defaults = {"num_blocks": 200, "max_num_seqs": 8, "max_num_batched_tokens": 256}
    return Engine(build("qwen3", 0), EngineConfig(**{**defaults, **options}))


@pytest.mark.parametrize("device", ["cuda", "metal"])
def test_the_engine_that_was_made_ready_begins_anew(device: DeviceName) -> None:
    engine = make_engine()
    assert measure_activations(engine, 120, vocab_size=50) > 0
    mixed = make_ready(engine, 120, 50, device)
    assert (mixed is None) == (device == "metal")
    assert not engine.has_work
    assert engine.stats().steps > 0
    engine.forget(mixed)
    stats = engine.stats()
    assert (stats.steps, stats.cache.lookups.queries, stats.blocks_used, stats.blocks_cached) == (
        0,
    ) * 4
    prompt = [i % 50 for i in range(30)]  # the start has run it
    engine.submit(GenerateRequest(0, prompt, 8, SamplingParams(temperature=0)))
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
    assert tokens == reference_generate(build("qwen3", 0), prompt, 8)[0]
    assert engine.stats().cache.lookups.hits == 0


@pytest.mark.parametrize("slots", [9, 20, None])
def test_what_decodes_share_is_computed_once_however_few_states_there_are(
    slots: int | None,
) -> None:
    config = EngineConfig(
        num_blocks=96, max_num_seqs=32, max_num_batched_tokens=256, num_state_slots=slots
    )
    engine = Engine(build("qwen3_next", 0), config)
    load = Load(engine, 50)
    with decodes_of_steps() as decodes:
        run_everything(load, 256, "cuda")
    assert max(decodes) == (32 if slots is None else slots - 2)
    # Half a thousand at each number of decodes if the state had gone.
    assert engine.stats().cache.lookups.missed_state < 512


@pytest.mark.parametrize(
    ("state_bytes", "free", "expected"),
    [(0, 1000, 0), (10, 10_000, 65), (10, 600, 30), (10, 0, 9)],
)
def test_states_that_kernels_are_collected_with_take_half_of_what_is_free(
    state_bytes: int, free: int, expected: int
) -> None:
    paged: Any = SimpleNamespace(bytes_per_state=state_bytes)
    assert start._slots_within(free, paged, max_num_seqs=32) == expected


def test_a_start_tells_nothing_of_prompts_that_nobody_sent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    write_model(folder, shrunk("Qwen3.5-9B", 4))
    config = WorkerConfig(str(folder), "", "", device="cpu", max_model_len=256)
    with caplog.at_level(logging.INFO, "quire.engine"):
        # On a GPU a start also runs the beginning of its longest prompt.
        with mock.patch.object(PagedModel, "whole_rows", 128):
            startup = start_engine(config, [], lambda *_: None)
        assert "prompt tokens are cached" not in caplog.text
        for length in (100, 70):  # pages of the second are there, but no state
            load = Load(startup.engine, 250)
            load.submit(load.first_prompt(length), 1)
            load.drain()
    assert "0 of 70 prompt tokens are cached" in caplog.text


@contextmanager
def decodes_of_steps() -> Iterator[list[int]]:
    counts: list[int] = []
    build_step = ModelRunner.build

    def counted(runner: ModelRunner, host: HostStep, previous: Step | None) -> Step:
        counts.append(sum(chunk.num_tokens == 1 for chunk in host.batch.chunks))
        return build_step(runner, host, previous)

    with mock.patch.object(ModelRunner, "build", counted):
        yield counts


def test_a_longest_step_without_memory_is_told() -> None:
    """The engine itself would go on with shorter steps, and all that follows be too large."""
    engine = make_engine()
    build_step = ModelRunner.build

    def limited(runner: ModelRunner, host: HostStep, previous: Step | None) -> Step:
        if host.batch.num_tokens > 50:
            raise RuntimeError("[malloc] Unable to allocate 17179869184 bytes.")
        return build_step(runner, host, previous)

    with (
        mock.patch.object(ModelRunner, "build", limited),
        pytest.raises(MemoryError, match="a step of 120 tokens"),
    ):
        measure_activations(engine, 120, vocab_size=50)
    assert engine.stats().memory_faults > 0
    engine.forget(None)
    assert engine.stats().memory_faults == 0


@pytest.fixture
def gpu_paths() -> Iterator[None]:
    with (
        selecting(Selector("cuda", None)),
        mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True),
        not_run_but_noted(lambda *launch: None),
    ):
        yield


def test_steps_of_all_sizes_are_run_and_those_of_decodes_compiled(gpu_paths: None) -> None:
    engine = make_engine(max_num_batched_tokens=128)
    seen = set()
    schedule = engine.scheduler.schedule
    compiled: list[int] = []
    run = Recurring.__call__

    def noted() -> object:
        batch = schedule()
        if batch is not None:
            seen.add((batch.num_decodes, batch.num_tokens - batch.num_decodes))
        return batch

    def noted_form(self: Recurring[Any], form: Hashable, *args: Any) -> Any:
        if self._at_once:
            compiled.append(received_rows(form))
        return run(self, form, *args)

    engine.scheduler.schedule = noted  # type: ignore[method-assign, assignment]
    with mock.patch.object(Recurring, "__call__", noted_form):
        make_ready(engine, 100, 50, "cuda")
    sizes = engine.model.padded_sizes(8, 100)
    assert sizes.decodes == [1, 2, 3, 4, 5, 6, 7, 8]
    assert sizes.mixed == [16, 32, 48, 64, 80, 96, 112]
    assert {n for n, prompt in seen if not prompt} == set(sizes.decodes)
    assert {prompt for _, prompt in seen} >= {16, 32, 48, 64, 80, 96, 100}
    assert set(compiled) == set(sizes.decodes)


def received_rows(form: Any) -> int:
    """How many rows a step of ``form`` has."""
    rows: int = form.spans[0].shape[0]
    return rows


@pytest.mark.parametrize(("per_step", "expected"), [(1000, 448), (100, 128)])
def test_prompt_tokens_that_take_as_long_as_decodes_are_measured(
    per_step: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that each step moves on, by so much and by 1 for each of its tokens."""
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=2048, num_blocks=300)
    now = 0.0
    schedule = engine.scheduler.schedule

    def timed() -> object:
        nonlocal now
        batch = schedule()
        if batch is not None:
            now += per_step + batch.num_tokens
        return batch

    engine.scheduler.schedule = timed  # type: ignore[method-assign, assignment]
    monkeypatch.setattr("quire.engine.startup.warm_up.time.perf_counter", lambda: now)
    # A prompt of 1,000 takes 2,000 and four decodes 1,004, as 502 of its tokens do; or 1,100 and
    # 104, as 94 do.
    assert measure_mixed_tokens(Load(engine, vocab_size=50), 1000) == expected
    assert not engine.has_work
