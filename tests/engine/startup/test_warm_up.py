"""What a start runs and learns."""

from __future__ import annotations

import pytest
from model_zoo import build, reference_generate

from quire.engine.engine import Engine, EngineConfig
from quire.engine.messages import GenerateRequest, SamplingParams
from quire.engine.startup.warm_up import Load, measure_mixed_tokens, run_every_size, warm_up


def make_engine(**options: int) -> Engine:
    defaults = {"num_blocks": 200, "max_num_seqs": 8, "max_num_batched_tokens": 256}
    return Engine(build("qwen3", 0), EngineConfig(**{**defaults, **options}))


@pytest.mark.parametrize("every_kernel", [False, True])
def test_nothing_is_left_behind(every_kernel: bool) -> None:
    engine = make_engine()
    found = warm_up(engine, 120, vocab_size=50, every_kernel=every_kernel)
    assert found.activation_bytes > 0
    assert (found.mixed_prompt_tokens is None) != every_kernel
    assert not engine.has_work
    assert engine.stats().blocks_used == 0
    prompt = [5 + i for i in range(30)]
    engine.submit(GenerateRequest(10**6, prompt, 8, SamplingParams(temperature=0)))
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
    assert tokens == reference_generate(build("qwen3", 0), prompt, 8)[0]


def test_steps_of_all_sizes_are_run() -> None:
    engine = make_engine(max_num_batched_tokens=1024)
    seen = set()
    schedule = engine.scheduler.schedule

    def noted() -> object:
        batch = schedule()
        if batch is not None:
            seen.add((batch.num_decodes, batch.num_tokens - batch.num_decodes))
        return batch

    engine.scheduler.schedule = noted  # type: ignore[method-assign, assignment]
    run_every_size(Load(engine, vocab_size=50), 1000)
    assert {n for n, prompt in seen if not prompt} == set(range(1, 9))
    prompts = {prompt for _, prompt in seen}
    assert prompts >= {16, 32, 48, 128, 160, 480, 512}
    assert max(prompts) == 512


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
