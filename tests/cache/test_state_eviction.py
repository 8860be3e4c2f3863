"""Which states to keep: those whose prompts take long, of conversations that go on."""

from __future__ import annotations

import random

import pytest

from quire.cache.block_hash import root_hash
from quire.cache.block_pool import BlockPool
from quire.cache.eviction import LRU, EvictionPolicy, make_state_policy
from quire.cache.pools import Pools
from quire.cache.sequence_cache import SequenceCache
from quire.cache.state_pool import StatePool

ROOT = root_hash("model")
SIZE, STEP = 16, 512
Trace = list[tuple[list[int], list[int]]]  # prompts and answers


def conversations(seed: int, num_agents: int, num_chats: int) -> Trace:
    """Agents whose prompts grow with results of tools, beside short chats, half of the turns each;
    agents and some chats begin with the same instructions."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> list[int]:
        return [draw.randrange(1000) for _ in range(draw.randint(low, high))]

    instructions = text(1500, 1500)
    going = [(True, instructions + text(200, 200), 8) for _ in range(num_agents)]
    for _ in range(num_chats):
        start = instructions if draw.random() < 0.3 else []
        going.append((False, start + text(50, 400), draw.choice([1, 1, 2, 3])))
    trace: Trace = []
    while going:
        agents = [each for each in going if each[0]]
        each = draw.choice(agents if agents and draw.random() < 0.5 else going)
        going.remove(each)
        is_agent, prompt, turns = each
        answer = text(30, 90)
        trace.append((prompt, answer))
        if turns > 1:
            more = text(600, 2000) if is_agent else text(20, 200)
            going.append((is_agent, prompt + answer + more, turns - 1))
    return trace


def computed(policy: EvictionPolicy, num_slots: int, trace: Trace) -> int:
    """Prompt tokens that are computed where only states are short."""
    states = StatePool(num_slots, 2048, policy)
    pools = Pools(BlockPool(100_000, SIZE, LRU()), states)
    pools.blocks.on_eviction.append(states.drop)
    total = 0
    for prompt, answer in trace:
        cache = SequenceCache(pools, ROOT)
        prefix = cache.find_prefix(prompt)
        assert cache.admit(prefix, prompt, len(prompt) + len(answer))
        done = len(prefix.blocks) * SIZE
        total += len(prompt) - done
        tokens = prompt + answer
        while done < len(tokens):
            count = min(STEP, len(prompt) - done) if done < len(prompt) else 1
            cache.move_state(done, count, 1)
            done += count
            cache.register(tokens, done)
            pools.release(cache.take_unneeded())
        pools.release(cache.detach(tokens, len(tokens)))
    pools.check([])
    return total


@pytest.mark.parametrize(
    ("num_agents", "num_chats", "most"), [(4, 20, 0.85), (4, 0, 0.95), (0, 40, 0.9)]
)
def test_states_that_save_more_are_kept(num_agents: int, num_chats: int, most: float) -> None:
    recent = ours = 0
    for seed in range(3):
        trace = conversations(seed, num_agents, num_chats)
        for num_slots in (12, 24):
            recent += computed(LRU(), num_slots, trace)
            ours += computed(make_state_policy("lru"), num_slots, trace)
    assert ours <= most * recent


def test_a_state_that_nobody_asks_for_goes_in_time() -> None:
    states = StatePool(4, 16, make_state_policy("cost"))

    def keep(block_hash: bytes, position: int) -> None:
        (slot,) = states.allocate(1)
        states.register(slot, block_hash, None, position)  # type: ignore[arg-type]
        states.release([slot])

    keep(b"long", 5000)
    for turn in range(200):
        keep(b"short %d" % turn, 400)
        if states.deepest([b"long"])[1] is None:  # type: ignore[list-item]
            break
    assert 5 < turn < 50
