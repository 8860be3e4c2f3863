"""Blocks and states of sequences keep their invariants over arbitrary histories."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.cache.block_hash import root_hash
from quire.cache.block_pool import BlockPool
from quire.cache.eviction import make_policy
from quire.cache.pools import Holdings, Pools
from quire.cache.sequence_cache import SequenceCache
from quire.cache.state_pool import EMPTY_SLOT, MIN_SLOTS, StatePool

ROOT = root_hash("model")
POLICIES = st.sampled_from(["lru", "fifo", "cost"])


@dataclass
class Twin:
    """A sequence's cache, and how far it has been planned and computed."""

    cache: SequenceCache
    tokens: list[int]
    planned: int


class CacheMachine(RuleBasedStateMachine):
    """Sequences that come, move, end and are cut short, with steps that retire later.

    The device is a list of tokens for each slot and block: what they would be a function of.
    """

    @initialize(
        num_slots=st.integers(MIN_SLOTS, 12),
        spacing=st.integers(1, 3),
        block_size=st.integers(1, 4),
        policy=POLICIES,
    )
    def start(self, num_slots: int, spacing: int, block_size: int, policy: str) -> None:
        self.blocks = BlockPool(40, block_size, make_policy(policy))  # type: ignore[arg-type]
        self.states = StatePool(num_slots, spacing * block_size, make_policy(policy))  # type: ignore[arg-type]
        self.blocks.on_eviction.append(self.states.drop)
        self.content: dict[int, list[int]] = {EMPTY_SLOT: []}
        self.twins: list[Twin] = []
        self.in_flight: deque[tuple[Twin, int]] = deque()
        self.held: list[Holdings] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=16))
    def admit(self, tokens: list[int]) -> None:
        cache = SequenceCache(Pools(self.blocks, self.states), ROOT)
        prefix = cache.find_prefix(tokens)
        start = len(prefix.blocks) * self.blocks.block_size
        assert start < len(tokens), "a hit must leave the last token to compute"
        assert (prefix.snapshot is None) == (start == 0)
        if prefix.snapshot is not None:
            assert self.content[prefix.snapshot] == tokens[:start], "a state of other tokens"
        before = self.states.num_available, self.blocks.num_available
        if cache.admit(prefix, tokens, len(tokens)):
            self.twins.append(Twin(cache, tokens, start))
        else:
            assert not any(cache.holdings)
            assert (self.states.num_available, self.blocks.num_available) == before

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), size=st.integers(1, 6), reserve=st.integers(0, 2))
    def plan(self, data: st.DataObject, size: int, reserve: int) -> None:
        twin = data.draw(st.sampled_from(self.twins))
        if twin.planned == len(twin.tokens):
            twin.tokens = [*twin.tokens, data.draw(st.integers(0, 1))]
        size = min(size, len(twin.tokens) - twin.planned)
        end = twin.planned + size
        if not twin.cache.blocks.grow(end):
            return
        moves = twin.cache.move_state(twin.planned, size, reserve)
        assert moves is not None
        assert self.content[moves.source] == twin.tokens[: twin.planned]
        assert moves.stores[-1][0] == size
        owned = [slot for other in self.twins for slot in other.cache.holdings.slots]
        for num_tokens, slot in moves.stores:
            assert owned.count(slot) == 1, "a slot that somebody else reads is written"
            self.content[slot] = twin.tokens[: twin.planned + num_tokens]
        twin.planned = end
        self.held.append(twin.cache.take_unneeded())
        self.in_flight.append((twin, end))

    @precondition(lambda self: self.in_flight)
    @rule()
    def retire(self) -> None:
        twin, end = self.in_flight.popleft()
        if twin in self.twins:
            twin.cache.register(twin.tokens, end)
            self.held.append(twin.cache.take_unneeded())
        if not self.in_flight:
            self.release()

    @precondition(lambda self: self.twins)
    @rule(data=st.data())
    def cut_short(self, data: st.DataObject) -> None:
        """Abortion, preemption and the end are one."""
        twin = data.draw(st.sampled_from(self.twins))
        self.twins.remove(twin)
        self.held.append(twin.cache.detach(twin.tokens, twin.planned))
        assert not any(twin.cache.holdings)

    def release(self) -> None:
        for holdings in self.held:
            self.blocks.release(holdings.blocks)
            self.states.release(holdings.slots)
        self.held = []

    @invariant()
    def conserved(self) -> None:
        if not hasattr(self, "states"):
            return
        owned = [*(twin.cache.holdings for twin in self.twins), *self.held]
        self.blocks.check(holdings.blocks for holdings in owned)
        self.states.check(holdings.slots for holdings in owned)
        for slot, tokens in self.content.items():
            if slot in self.states._cached:
                expected = SequenceCache(Pools(self.blocks), ROOT).blocks.hash_before(
                    len(tokens), tokens
                )
                found = self.states._cached[slot].block_hash
                assert found == expected, "a snapshot under another's hash"

    def teardown(self) -> None:
        if not hasattr(self, "states"):
            return
        for twin in self.twins:
            self.held.append(twin.cache.detach(twin.tokens, twin.planned))
        self.release()
        self.states.check([])
        assert self.states.num_used == 0
        self.states.allocate(self.states.num_usable)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def pools(num_slots: int = 9, spacing: int = 8) -> tuple[BlockPool, StatePool]:
    return (
        BlockPool(64, 4, make_policy("lru")),
        StatePool(num_slots, spacing, make_policy("lru")),
    )


def computed(
    blocks: BlockPool, states: StatePool, prompt: list[int], output: list[int]
) -> SequenceCache:
    """A sequence with its prompt in one step and its output token by token."""
    cache = SequenceCache(Pools(blocks, states), ROOT)
    prefix = cache.find_prefix(prompt)
    assert cache.admit(prefix, prompt, len(prompt))
    start = len(prefix.blocks) * blocks.block_size
    cache.move_state(start, len(prompt) - start, reserve=0)
    cache.register(prompt, len(prompt))
    tokens = list(prompt)
    for token in output:
        tokens.append(token)
        assert cache.blocks.grow(len(tokens))
        cache.move_state(len(tokens) - 1, 1, reserve=0)
        cache.register(tokens, len(tokens))
        states.release(cache.take_unneeded().slots)
    return cache


def end(cache: SequenceCache, blocks: BlockPool, states: StatePool, tokens: list[int]) -> None:
    holdings = cache.detach(tokens, len(tokens))
    blocks.release(holdings.blocks)
    states.release(holdings.slots)


def num_found(blocks: BlockPool, states: StatePool, tokens: list[int]) -> int:
    return 4 * len(SequenceCache(Pools(blocks, states), ROOT).find_prefix(tokens).blocks)


def test_the_next_turn_goes_on_behind_the_answer() -> None:
    blocks, states = pools()
    prompt, answer = list(range(10)), list(range(50, 63))
    end(computed(blocks, states, prompt, answer), blocks, states, prompt + answer)
    # 23 tokens were computed: five blocks.
    assert num_found(blocks, states, [*prompt, *answer, 99]) == 20
    assert states.num_used == 0


def test_a_decoding_sequence_has_two_slots_however_long() -> None:
    blocks, states = pools()
    computed(blocks, states, [1, 2], list(range(100)))
    assert states.num_used == 2


def test_a_prompt_that_leaves_another_makes_a_snapshot_there() -> None:
    blocks, states = pools(spacing=1000)
    shared = list(range(20))
    first, second, third = ([*shared, *range(start, start + 20)] for start in (100, 200, 300))
    end(computed(blocks, states, first, []), blocks, states, first)
    found = SequenceCache(Pools(blocks, states), ROOT).find_prefix(second)
    assert (found.blocks, found.num_pages) == ([], 5)
    end(computed(blocks, states, second, []), blocks, states, second)
    assert num_found(blocks, states, third) == 20


def test_a_template_that_changes_how_the_answer_opens_costs_one_block_at_most() -> None:
    blocks, states = pools(spacing=1000)
    conversation, opening = list(range(21)), [90, 91, 92, 93, 94]
    prompt = conversation + opening
    end(computed(blocks, states, prompt, [7] * 30), blocks, states, prompt + [7] * 30)
    assert num_found(blocks, states, [*conversation, 80, *range(30)]) >= 16


def test_without_slots_to_spare_nothing_is_kept() -> None:
    blocks, states = pools(num_slots=MIN_SLOTS)
    first = computed(blocks, states, list(range(9)), [])
    second = SequenceCache(Pools(blocks, states), ROOT)
    assert len(first.holdings.slots) == 2
    assert not second.admit(second.find_prefix([1]), [1], 1)


def test_a_snapshot_goes_with_the_block_it_stands_behind() -> None:
    blocks, states = pools()
    blocks.on_eviction.append(states.drop)
    prompt = list(range(18))
    end(computed(blocks, states, prompt, []), blocks, states, prompt)
    assert states.num_cached > 1
    blocks.allocate(blocks.num_usable)
    assert states.num_cached == 0
    assert states.num_free == states.num_usable
    states.check([])


def test_too_few_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        StatePool(MIN_SLOTS - 1, 16, make_policy("lru"))


def test_what_is_computed_again_is_found_whatever_becomes_of_the_first_copy() -> None:
    """Pages are there, but the state behind them is not: others took its slot."""
    blocks, states = pools()
    prompt, answer = list(range(17)), list(range(50, 60))
    end(computed(blocks, states, prompt, []), blocks, states, prompt)
    for block_hash in list(states._by_hash):
        states.drop(block_hash)
    again = computed(blocks, states, prompt, answer)
    assert len(again.find_prefix(prompt).blocks) == 4
    blocks.release(blocks.allocate(blocks.num_available))
    blocks.check([again.holdings.blocks])
    end(again, blocks, states, prompt + answer)
    assert num_found(blocks, states, [*prompt, *answer, 99]) == 24


def test_what_the_step_in_flight_fills_is_found_too() -> None:
    blocks, states = pools(spacing=1000)
    cache = computed(blocks, states, list(range(9)), [])
    tokens = list(range(16))
    assert cache.blocks.grow(16)
    cache.move_state(9, 7, reserve=0)
    holdings = cache.detach(tokens, 16)
    assert num_found(blocks, states, [*tokens, 99]) == 16
    blocks.release(holdings.blocks)
    states.release(holdings.slots)


def test_an_answer_that_loses_its_last_block_is_not_lost_whole() -> None:
    blocks, states = pools(num_slots=20, spacing=8)
    blocks.on_eviction.append(states.drop)
    prompt, answer = list(range(4)), list(range(50, 90))
    end(computed(blocks, states, prompt, answer), blocks, states, prompt + answer)
    blocks.release(blocks.allocate(blocks.num_free + 1))
    assert num_found(blocks, states, [*prompt, *answer, 99]) == 40


def test_the_newest_state_of_an_answer_makes_room_for_who_waits() -> None:
    blocks, states = pools(num_slots=3)
    first = computed(blocks, states, [1, 2], [3, 4, 5])
    assert states.num_available == 0
    second = SequenceCache(Pools(blocks, states), ROOT)
    assert not second.admit(second.find_prefix([1]), [1], 1)
    first.move_state(5, 1, reserve=1)
    states.release(first.take_unneeded().slots)
    assert second.admit(second.find_prefix([1]), [1], 1)


def test_states_of_a_prompt_are_kept_however_many_wait() -> None:
    """They are free for others as soon as the step has retired."""
    blocks, states = pools(num_slots=6, spacing=1000)
    prompt = list(range(9))
    cache = SequenceCache(Pools(blocks, states), ROOT)
    assert cache.admit(cache.find_prefix(prompt), prompt, 9)
    cache.move_state(0, 9, reserve=4)
    cache.register(prompt, 9)
    end(cache, blocks, states, prompt)
    assert num_found(blocks, states, prompt) == 8
