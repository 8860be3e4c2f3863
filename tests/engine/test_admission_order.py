"""Who finds most of its prompt in the cache goes first, and nobody waits for ever for it."""

from __future__ import annotations

import random

from simulated_device import VOCAB, Simulation, reference, request

from quire.engine.admission_order import put_cached_first

DRAW = random.Random(0)


def text(length: int) -> list[int]:
    return [DRAW.randrange(VOCAB) for _ in range(length)]


def simulation() -> Simulation:
    """One request at a time."""
    return Simulation(1000, 4, max_num_seqs=1, max_num_batched_tokens=700)


def ended(sim: Simulation) -> list[int]:
    """All requests, in the order in which they were answered."""
    sim.drain()
    return list(sim.outputs)


def test_who_is_cached_goes_first() -> None:
    sim = simulation()
    history = text(600)
    sim.scheduler.submit(request(0, history, 1))
    sim.drain()
    sim.scheduler.submit(request(1, text(40), 5))
    sim.step()
    others = [request(i, text(40), 1) for i in (2, 3)]
    again = request(4, history + text(10), 1)
    urgent = request(5, text(40), 1, priority=-1)
    for item in (*others, again, urgent):
        sim.scheduler.submit(item)
    assert ended(sim) == [0, 1, 5, 4, 2, 3]
    for item in (*others, again, urgent):
        assert sim.result(item.request_id) == reference(item)


def test_nobody_is_passed_over_more_often_than_others_wait() -> None:
    sim = simulation()
    history = text(600)
    sim.scheduler.submit(request(0, history, 1))
    sim.drain()
    sim.scheduler.submit(request(1, history + text(5), 5))
    sim.step()
    sim.scheduler.submit(request(2, text(40), 1))
    for i in range(3, 15):
        sim.scheduler.submit(request(i, history + text(5), 1))
    # When seven have passed it, six wait, itself included.
    assert ended(sim) == [0, 1, *range(3, 10), 2, *range(10, 15)]


def test_prompts_too_long_to_look_up_at_once_are_looked_up_step_by_step() -> None:
    sim = Simulation(40_000, 4, max_num_seqs=1, max_num_batched_tokens=40_000)
    history = text(30_000)
    sim.scheduler.submit(request(0, history, 1))
    sim.drain()
    sim.scheduler.submit(request(1, text(8), 9))
    for i in (2, 3, 4):
        sim.scheduler.submit(request(i, text(30_000), 1))
    sim.scheduler.submit(request(5, history + text(5), 1))
    assert ended(sim) == [0, 1, 5, 2, 3, 4]


def test_without_anything_cached_they_go_as_they_came() -> None:
    sim = simulation()
    for i in range(20):
        sim.scheduler.submit(request(i, text(12), 2))
    assert ended(sim) == list(range(20))


def test_a_preempted_one_is_not_sorted_behind_those_that_are_cached() -> None:
    sim = simulation()
    history = text(600)
    sim.scheduler.submit(request(0, history, 1))
    sim.drain()
    sim.scheduler.submit(request(1, text(40), 50))
    sim.step()
    sim.step()
    sim.scheduler.submit(request(2, history + text(5), 1))
    preempted = sim.scheduler.running[0]
    sim.scheduler._preempt(preempted)
    put_cached_first(sim.scheduler.waiting, 4, 1 << 16)
    assert sim.scheduler.waiting[0] is preempted
    sim.drain()
