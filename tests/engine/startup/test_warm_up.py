"""What a start runs and learns."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any
from unittest import mock

import pytest
from model_zoo import build, reference_generate

from quire.engine.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.memory.budget import DeviceName
from quire.engine.messages import GenerateRequest, SamplingParams
from quire.engine.model.recurring import Recurring
from quire.engine.startup.warm_up import (
    Load,
    make_ready,
    measure_activations,
    measure_mixed_tokens,
)
from quire.engine.step.runner import HostStep, ModelRunner, Step
from quire.kernels.choice.selection import Selector, selecting
from quire.kernels.gpu_kernel import not_run_but_noted


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
    assert (stats.steps, stats.cache.queries, stats.blocks_used, stats.blocks_cached) == (0,) * 4
    prompt = [i % 50 for i in range(30)]  # the start has run it
    engine.submit(GenerateRequest(0, prompt, 8, SamplingParams(temperature=0)))
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
    assert tokens == reference_generate(build("qwen3", 0), prompt, 8)[0]
    assert engine.stats().cache.hits == 0


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
