"""The scheduler against a simulated device: nothing is lost and nobody's tokens change."""

from __future__ import annotations

import random
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import VOCAB, Simulation, arrivals, reference, request

from quire.cache.eviction import make_policy
from quire.cache.sequence_cache import Prefix, SequenceCache
from quire.cache.state_pool import MIN_SLOTS, StatePool
from quire.cache.window_pool import WindowPool, blocks_of_window
from quire.engine import scheduler
from quire.engine.errors import RequestTooLong
from quire.engine.messages import GenerateRequest


@settings(max_examples=300, deadline=None)
@given(
    arrivals(),
    st.integers(1, 6),
    st.integers(0, 12),
    st.integers(1, 6),
    st.integers(1, 24),
    st.one_of(st.none(), st.integers(1, 8)),
    st.booleans(),
    st.one_of(st.none(), st.integers(MIN_SLOTS, 16)),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(1, 12)),
    st.integers(0, 8),
)
def test_any_schedule_gives_each_request_its_own_tokens(
    jobs: list[tuple[int, GenerateRequest, int | None]],
    block_size: int,
    spare_blocks: int,
    max_num_seqs: int,
    extra_budget: int,
    mixed_prompt_tokens: int | None,
    look_ahead: bool,
    num_slots: int | None,
    spacing: int,
    window: int | None,
    spare_window_blocks: int,
) -> None:
    longest = max(len(r.prompt_token_ids) + r.max_tokens for _, r, _ in jobs)
    states = None
    if num_slots is not None:
        states = StatePool(num_slots, spacing * block_size, make_policy("lru"))
    windows = None
    if window is not None:
        least = blocks_of_window(window, block_size)
        windows = WindowPool(
            1 + least + spare_window_blocks, block_size, window, make_policy("lru")
        )
    sim = Simulation(
        1 + -(-longest // block_size) + spare_blocks,
        block_size,
        look_ahead=look_ahead,
        states=states,
        windows=windows,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + extra_budget,
        mixed_prompt_tokens=mixed_prompt_tokens,
    )
    now = 0
    while now <= 30:
        for at, item, abort_after in jobs:
            if at == now:
                sim.scheduler.submit(item)
            if abort_after is not None and at + abort_after == now:
                sim.scheduler.abort(item.request_id)
        sim.step()
        now += 1
    sim.drain()
    for _, item, abort_after in jobs:
        tokens, reason = reference(item)
        if abort_after is None:
            assert sim.result(item.request_id) == (tokens, reason)
        elif item.request_id in sim.outputs:
            got, _ = sim.result(item.request_id)
            assert got == tokens[: len(got)]
    for pool in (sim.pool, sim.states, sim.windows):
        if pool is not None:
            assert pool.num_used == 0
            pool.check([])


def test_preemption_happens_and_changes_nothing() -> None:
    rng = random.Random(1)
    sim = Simulation(12, 4, max_num_seqs=8, max_num_batched_tokens=16)
    jobs = [request(i, [rng.randrange(VOCAB) for _ in range(6)], 30) for i in range(8)]
    for item in jobs:
        sim.scheduler.submit(item)
    sim.drain()
    assert sim.scheduler.num_preemptions > 0
    for item in jobs:
        assert sim.result(item.request_id) == reference(item)


def test_windows_that_outgrow_their_pool_preempt_and_change_nothing() -> None:
    rng = random.Random(1)
    windows = WindowPool(1 + blocks_of_window(12, 4, 16) + 5, 4, 12, make_policy("lru"))
    sim = Simulation(200, 4, windows=windows, max_num_seqs=8, max_num_batched_tokens=16)
    jobs = [request(i, [rng.randrange(VOCAB) for _ in range(6)], 60) for i in range(8)]
    for item in jobs:
        sim.scheduler.submit(item)
    sim.drain()
    assert sim.scheduler.num_preemptions > 0
    for item in jobs:
        assert sim.result(item.request_id) == reference(item)


def test_a_window_in_a_pool_of_the_least_size_goes_on_at_full_step() -> None:
    """Who runs alone is never preempted, though its blocks come back only a step later."""
    budget = 16
    windows = WindowPool(1 + blocks_of_window(12, 4, budget), 4, 12, make_policy("lru"))
    sim = Simulation(200, 4, windows=windows, max_num_seqs=2, max_num_batched_tokens=budget)
    item = request(0, [i % VOCAB for i in range(330)], 20)
    sim.scheduler.submit(item)
    sim.drain()
    assert sim.scheduler.num_preemptions == 0
    assert sim.result(0) == reference(item)


def test_chunks_are_as_long_as_fit_beside_a_window() -> None:
    windows = WindowPool(1 + blocks_of_window(12, 4, 5), 4, 12, make_policy("lru"))
    sim = Simulation(200, 4, windows=windows, max_num_seqs=2, max_num_batched_tokens=16)
    item = request(0, [i % VOCAB for i in range(130)], 20)
    sim.scheduler.submit(item)
    sim.drain()
    assert sim.scheduler.num_preemptions == 0
    assert sim.result(0) == reference(item)
    few = WindowPool(blocks_of_window(12, 4), 4, 12, make_policy("lru"))
    with pytest.raises(ValueError, match="hold no window of 12"):
        Simulation(200, 4, windows=few, max_num_seqs=2, max_num_batched_tokens=16)


def test_a_long_prompt_does_not_stall_decodes() -> None:
    sim = Simulation(400, 4, max_num_seqs=4, max_num_batched_tokens=16)
    sim.scheduler.submit(request(0, [0, 1], 60))
    for _ in range(5):
        sim.step()
    sim.scheduler.submit(request(1, [2] * 400, 1))
    while 1 not in sim.outputs:
        before = len(sim.outputs[0])
        sim.step()
        assert len(sim.outputs[0]) == before + 1, "a decode missed a step"


def test_the_more_decodes_wait_the_fewer_prompt_tokens_a_step_has() -> None:
    limits = {"max_num_seqs": 32, "max_num_batched_tokens": 256, "mixed_prompt_tokens": 24}
    for num_decodes, expected in [(0, 256), (1, 255), (4, 64), (16, 24)]:
        sim = Simulation(2000, 4, **limits)
        for i in range(num_decodes):
            sim.scheduler.submit(request(i, [i % VOCAB], 40))
        for _ in range(3):
            sim.step()
        sim.scheduler.submit(request(100, [0, 1, 2, 2] * 100, 1))
        sim.step()
        assert sim.in_flight is not None
        assert [c.num_tokens for c in sim.in_flight.chunks] == [1] * num_decodes + [expected]


def test_short_prompts_beside_decodes_are_not_cut() -> None:
    sim = Simulation(2000, 4, max_num_seqs=32, max_num_batched_tokens=256, mixed_prompt_tokens=24)
    for i in range(16):
        sim.scheduler.submit(request(i, [i % VOCAB], 80))
    for _ in range(3):
        sim.step()
    for i, length in enumerate([10, 10, 10, 60, 5]):
        sim.scheduler.submit(request(100 + i, list(range(50 * i, 50 * i + length)), 3))
    seen = []
    for _ in range(6):
        sim.step()
        assert sim.in_flight is not None
        batch = sim.in_flight
        seen.append([c.num_tokens for c in batch.chunks[batch.num_decodes :]])
    # Two that fit whole, the third; then a long one in pieces, and what fits behind its last.
    assert seen == [[10, 10], [10], [24], [24], [12, 5], []]


def test_decodes_do_not_starve_a_prompt() -> None:
    sim = Simulation(400, 4, max_num_seqs=8, max_num_batched_tokens=9)
    for i in range(7):
        sim.scheduler.submit(request(i, [i % VOCAB], 200))
    for _ in range(10):
        sim.step()
    sim.scheduler.submit(request(7, [1] * 30, 1))
    for _ in range(40):
        sim.step()
    assert sim.result(7) == reference(request(7, [1] * 30, 1))
    assert len(sim.scheduler.running) == 7


def test_repeated_prompts_hit_the_prefix_cache() -> None:
    sim = Simulation(64, 4, max_num_seqs=4, max_num_batched_tokens=32)
    prompt = [0, 1, 2] * 6
    for i, salt in enumerate(["", "", "tenant"]):
        sim.scheduler.submit(request(i, prompt, 3, cache_salt=salt))
        sim.drain()
    cached = [sim.outputs[i][0].num_cached_tokens for i in range(3)]
    assert cached == [0, 16, 0]
    assert sim.result(0) == sim.result(1) == sim.result(2)
    found = sim.scheduler.lookups
    assert (found.queries, found.hits) == (54, 16)
    # Of 18 tokens 16 lie in full blocks; another tenant's prompt is as new as the first.
    assert (found.missed_evicted, found.missed_new, found.missed_tail) == (0, 32, 6)


def test_the_queue_time_of_a_request_is_that_before_its_first_step(monkeypatch) -> None:
    clock = 0.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    sim = Simulation(64, 4, max_num_seqs=1, max_num_batched_tokens=32)
    for i in range(2):
        sim.scheduler.submit(request(i, [0, 1, i], 3))
    while sim.scheduler.has_work:
        clock += 1.0
        sim.step()
    waited = [[output.queue_seconds for output in sim.outputs[i]] for i in range(2)]
    assert waited[0] == [1.0] * 3
    assert waited[1][0] > 2.0
    assert len(set(waited[1])) == 1


def test_requests_that_arrive_together_compute_a_shared_prefix_once() -> None:
    sim = Simulation(200, 4, max_num_seqs=8, max_num_batched_tokens=32)
    shared = [0, 1, 2, 2, 1] * 16
    for i in range(6):
        sim.scheduler.submit(request(i, [*shared, i % VOCAB], 4))
    # Somebody without anything in common is not held up by those who wait.
    sim.scheduler.submit(request(6, [1, 1, 2], 4))
    for _ in range(4):
        sim.step()
    assert 6 in sim.outputs
    sim.drain()
    cached = [sim.outputs[i][0].num_cached_tokens for i in range(6)]
    assert cached == [0] + [80] * 5
    assert sim.pool.num_used == 0


@pytest.mark.parametrize("states", [False, True])
def test_those_who_wait_for_a_prefix_are_looked_up_only_when_they_may_begin(states: bool) -> None:
    """A lookup hashes the prompt and searches all of its blocks."""
    lookups: list[int] = []
    find_prefix = SequenceCache.find_prefix

    def counted(cache: SequenceCache, token_ids: list[int]) -> Prefix:
        lookups.append(len(token_ids))
        return find_prefix(cache, token_ids)

    pool = StatePool(40, 16, make_policy("lru")) if states else None
    sim = Simulation(400, 4, max_num_seqs=8, max_num_batched_tokens=16, states=pool)
    shared = [0, 1, 2, 2, 1] * 40
    with mock.patch.object(SequenceCache, "find_prefix", counted):
        for i in range(8):
            sim.scheduler.submit(request(i, [*shared, i % VOCAB], 4))
        sim.drain()
    assert len(lookups) < 8 * 6
    assert [sim.outputs[i][0].num_cached_tokens for i in range(1, 8)] >= [192] * 7


def test_a_step_looks_up_so_many_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "_MAX_LOOKED_UP", 100)
    sim = Simulation(400, 4, max_num_seqs=16, max_num_batched_tokens=1000)
    for i in range(10):
        sim.scheduler.submit(request(i, [i % VOCAB] * 60, 1))
    sim.step()
    assert len(sim.scheduler.waiting) == 8
    sim.drain()
    assert all(len(sim.result(i)[0]) == 1 for i in range(10))


def test_those_who_wait_for_a_prefix_go_on_if_its_author_is_gone() -> None:
    sim = Simulation(200, 4, max_num_seqs=8, max_num_batched_tokens=16)
    shared = [0, 1, 2, 2, 1] * 16
    for i in range(3):
        sim.scheduler.submit(request(i, [*shared, i], 4))
    sim.step()
    assert len(sim.scheduler.running) == 1
    sim.scheduler.abort(0)
    sim.drain()
    for i in (1, 2):
        assert sim.result(i) == reference(request(i, [*shared, i], 4))


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    sim = Simulation(5, 4, max_num_seqs=2, max_num_batched_tokens=8)
    with pytest.raises(RequestTooLong, match="16 tokens the KV cache holds"):
        sim.scheduler.submit(request(0, [1] * 10, 8))
    sim.scheduler.submit(request(1, [1] * 10, 7))
    sim.drain()
    assert len(sim.result(1)[0]) == 7


def test_abort_in_flight_gives_blocks_back_only_after_the_step_retired() -> None:
    sim = Simulation(16, 4, max_num_seqs=2, max_num_batched_tokens=8)
    sim.scheduler.submit(request(0, [1] * 6, 20))
    sim.step()
    assert sim.in_flight is not None
    sim.scheduler.abort(0)
    assert sim.pool.num_used == 2
    sim.step()
    assert sim.pool.num_used == 0
    assert 0 not in sim.outputs


def test_limits_that_would_starve_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="larger than max_num_seqs"):
        Simulation(8, 4, max_num_seqs=8, max_num_batched_tokens=8)


def test_bad_submissions_are_errors() -> None:
    sim = Simulation(8, 4, max_num_seqs=2, max_num_batched_tokens=8)
    sim.scheduler.submit(request(0, [1], 4))
    with pytest.raises(ValueError, match="in use"):
        sim.scheduler.submit(request(0, [1], 4))
    with pytest.raises(ValueError, match="prompt"):
        sim.scheduler.submit(request(1, [], 4))
    with pytest.raises(ValueError, match="at least one token"):
        sim.scheduler.submit(request(2, [1], 0))
