"""Models with recurrent layers in the engine: what is cached of them, and memory."""

from __future__ import annotations

import logging
import random

import mlx.core as mx
import pytest
from model_zoo import build, reference_generate

from quire.engine.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.messages import GenerateRequest, SamplingParams, TokenOutput

GREEDY = SamplingParams(temperature=0)


def make_engine(name: str = "nemotron_h", **options: object) -> Engine:
    defaults = {"num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 48}
    return Engine(build(name), EngineConfig(**{**defaults, **options}))  # type: ignore[arg-type]


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(100) for _ in range(length)]


def drain(engine: Engine) -> list[TokenOutput]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def ask(engine: Engine, ids: list[int], max_tokens: int, salt: str = "") -> tuple[list[int], int]:
    """The answer, and how many of the prompt's tokens were cached."""
    engine.submit(GenerateRequest(0, ids, max_tokens, GREEDY, cache_salt=salt))
    outputs = drain(engine)
    return [t for o in outputs for t in o.token_ids], outputs[-1].num_cached_tokens


def test_states_are_written_in_place() -> None:
    """A second copy of the states, even for a moment, would show in the peak."""
    engine = make_engine(num_state_slots=8000)
    model = engine.model
    pool_bytes = 8000 * model.bytes_per_state
    assert pool_bytes > 40 << 20
    for i in range(8):
        engine.submit(GenerateRequest(i, prompt(30, seed=i), 30, GREEDY))
    for _ in range(3):
        engine.step()
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    drain(engine)
    assert mx.get_peak_memory() - before < pool_bytes / 20


@pytest.mark.parametrize("name", ["nemotron_h", "lfm2"])
@pytest.mark.parametrize("num_output", [3, 25, 40])
def test_the_next_turn_of_a_conversation_reuses_the_answer(name: str, num_output: int) -> None:
    engine = make_engine(name)
    ids, before = prompt(40), 0
    for turn in range(4):
        answer, cached = ask(engine, ids, num_output)
        # All that was computed, rounded down to a block: the last token sampled was not.
        assert cached == before // 16 * 16
        assert answer == reference_generate(build(name), ids, num_output)[0]
        before = len(ids) + num_output - 1
        ids = ids + answer + prompt(10, seed=turn + 5)


def test_a_message_that_was_changed_leaves_what_is_in_front_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make_engine()
    conversation = prompt(100)
    ask(engine, conversation, 4)
    changed = [*conversation[:70], *prompt(30, seed=3)]
    with caplog.at_level(logging.INFO, logger="quire.engine.lookups"):
        assert ask(engine, changed, 4)[1] == 0
    assert "0 of 100 prompt tokens are cached: pages 64, state 0" in caplog.text
    assert engine.stats().cache.lookups.missed_state == 64
    # Now that two have parted there, the third goes on from there.
    assert ask(engine, [*conversation[:70], *prompt(30, seed=4)], 4)[1] == 64


def test_requests_of_one_prompt_that_come_together_compute_it_once() -> None:
    engine = make_engine()
    ids = prompt(120)
    for i in range(4):
        engine.submit(GenerateRequest(i, ids, 3, GREEDY))
    cached = {output.request_id: output.num_cached_tokens for output in drain(engine)}
    assert cached == {0: 0, 1: 112, 2: 112, 3: 112}


def test_nobody_finds_the_states_of_another_salt() -> None:
    engine = make_engine()
    assert ask(engine, prompt(60), 4, "one")[1] == 0
    assert ask(engine, prompt(60), 4, "other")[1] == 0
    assert ask(engine, prompt(60), 4, "one")[1] == 48


def test_a_preempted_sequence_goes_on_from_its_last_block() -> None:
    engine = make_engine(num_blocks=14)
    requests = [GenerateRequest(i, prompt(40, seed=i), 60, GREEDY) for i in range(3)]
    for request in requests:
        engine.submit(request)
    outputs: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
        engine.scheduler.check()
    assert engine.stats().preemptions > 0
    for request in requests:
        expected = reference_generate(build("nemotron_h"), request.prompt_token_ids, 60)[0]
        assert outputs[request.request_id] == expected


def test_aborts_leave_nothing_behind() -> None:
    engine = make_engine(num_state_slots=6)
    draw = random.Random(0)
    for i in range(40):
        engine.submit(GenerateRequest(i, prompt(draw.randint(1, 80), seed=i % 5), 30, GREEDY))
        for _ in range(draw.randint(0, 3)):
            engine.step()
        engine.abort(draw.randint(0, i))
        engine.scheduler.check()
    drain(engine)
    engine.scheduler.check()
    stats = engine.stats()
    assert stats.states is not None
    assert stats.states.used == stats.blocks_used == 0
    assert stats.states.cached + stats.states.free == 5
