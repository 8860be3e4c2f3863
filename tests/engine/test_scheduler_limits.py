"""Steps that fail, and prompts that are cut: nobody's tokens change."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_device import Simulation, arrivals, reference, request

from quire.engine.messages import GenerateRequest


@settings(max_examples=200, deadline=None)
@given(
    arrivals(),
    st.sets(st.integers(1, 30), max_size=6),
    st.integers(30, 400),
    st.integers(1, 24),
    st.booleans(),
)
def test_steps_that_failed_are_computed_again(
    jobs: list[tuple[int, GenerateRequest, int | None]],
    failing: set[int],
    max_attended: int,
    prompt_limit: int,
    look_ahead: bool,
) -> None:
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 24, "max_attended": max_attended}
    sim = Simulation(40, 4, look_ahead=look_ahead, **limits)
    sim.scheduler.limits.prompt_tokens = prompt_limit
    for step in range(32):
        for arrival, item, _ in jobs:
            if arrival == step:
                sim.scheduler.submit(item)
        if step in failing:
            # The step in flight, if there is one, and all that pages hold.
            sim.in_flight = None
            sim.device.slots.clear()
            sim.scheduler.start_over()
            sim.scheduler.check()
            assert sim.pool.num_free == sim.pool.num_usable
        sim.step()
    sim.drain()
    for _, item, _ in jobs:
        assert sim.result(item.request_id) == reference(item)


def test_rows_times_contexts_are_bounded() -> None:
    sim = Simulation(4000, 4, max_num_seqs=4, max_num_batched_tokens=512, max_attended=64 * 1024)
    sim.scheduler.submit(request(0, [0, 1, 2, 1] * 1500, 3))
    sim.scheduler.submit(request(1, [2, 1] * 150, 3))
    chunks = []
    while sim.scheduler.has_work:
        sim.step()
        if sim.in_flight is None:
            continue
        prompts = [c for c in sim.in_flight.chunks if c.num_tokens > 1]
        attended = sum(c.num_tokens * c.context_length for c in prompts)
        assert attended <= 64 * 1024 or [c.num_tokens for c in prompts] == [16]
        chunks += [(c.start, c.num_tokens) for c in prompts if c.sequence.request.request_id == 0]
    # The further, the fewer, down to what one chunk always has.
    sizes = [size for _, size in chunks]
    assert sizes[0] > 100
    assert sizes[-2] == 16
    assert sum(sizes) >= 5999


@pytest.mark.parametrize("limit", [1, 7])
def test_prompts_are_cut_and_decodes_are_not(limit: int) -> None:
    sim = Simulation(400, 4, max_num_seqs=8, max_num_batched_tokens=64)
    sim.scheduler.limits.prompt_tokens = limit
    for i in range(4):
        sim.scheduler.submit(request(i, [i % 3] * 20, 10))
    while sim.scheduler.has_work:
        sim.step()
        if sim.in_flight is not None:
            batch = sim.in_flight
            # One token of a prompt counts as a decode.
            assert batch.num_tokens <= batch.num_decodes + limit
    for i in range(4):
        assert sim.result(i) == reference(request(i, [i % 3] * 20, 10))
