"""Blocks behind sliding windows go when nobody sees them, no sooner; hits have a whole window."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.cache.block_hash import root_hash
from quire.cache.block_pool import SCRATCH_BLOCK, BlockPool
from quire.cache.eviction import make_policy
from quire.cache.pools import Holdings, Needs, Pools
from quire.cache.sequence_cache import Prefix, SequenceCache
from quire.cache.state_pool import EMPTY_SLOT, MIN_SLOTS, StatePool
from quire.cache.window_pool import WindowPool, blocks_of_window

ROOT = root_hash("model")
POLICIES = st.sampled_from(["lru", "fifo", "cost"])


@dataclass
class Twin:
    """A sequence's cache, and how far it has been planned."""

    cache: SequenceCache
    tokens: list[int]
    planned: int


@dataclass
class Step:
    twin: Twin
    end: int
    reads: dict[int, tuple[int, ...]]  # what it finds in the blocks of its windows


class WindowMachine(RuleBasedStateMachine):
    """Sequences that come, grow, end and are cut short, with steps that retire later.

    The device is a list of tokens for each block: what keys and values would be a function of.
    """

    @initialize(
        num_blocks=st.integers(4, 20),
        window=st.integers(1, 9),
        block_size=st.integers(1, 4),
        policy=POLICIES,
        num_slots=st.one_of(st.none(), st.integers(MIN_SLOTS, 12)),
    )
    def start(
        self, num_blocks: int, window: int, block_size: int, policy: str, num_slots: int | None
    ) -> None:
        def new_policy():
            return make_policy(policy)  # type: ignore[arg-type]

        self.size, self.window = block_size, window
        states = None
        if num_slots is not None:
            states = StatePool(num_slots, 2 * block_size, new_policy())
        windows = WindowPool(num_blocks, block_size, window, new_policy())
        self.pools = Pools(BlockPool(40, block_size, new_policy()), states, windows)
        for pool in (states, windows):
            if pool is not None:
                self.pools.blocks.on_eviction.append(pool.drop)
        self.windows = windows
        self.content: dict[int, tuple[int, ...]] = {}
        self.states_of: dict[int, tuple[int, ...]] = {EMPTY_SLOT: ()}
        self.twins: list[Twin] = []
        self.in_flight: deque[Step] = deque()
        self.held: list[Holdings] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=24), reserve=st.integers(0, 3))
    def admit(self, tokens: list[int], reserve: int) -> None:
        cache = SequenceCache(self.pools, ROOT)
        prefix = cache.find_prefix(tokens)
        start = len(prefix.blocks) * self.size
        assert start < len(tokens), "a hit must leave the last token to compute"
        self.check_hit(prefix, tokens)
        before = self.windows.num_available, self.pools.blocks.num_available
        if cache.admit(prefix, tokens, min(len(tokens), start + 4), Needs(0, reserve)):
            assert self.windows.num_available >= reserve
            self.twins.append(Twin(cache, tokens, start))
        else:
            assert not any(cache.holdings)
            assert (self.windows.num_available, self.pools.blocks.num_available) == before

    def check_hit(self, prefix: Prefix, tokens: list[int]) -> None:
        """A hit has all that the next token sees, and no longer one would have."""
        depth = len(prefix.blocks)
        first = max(0, depth * self.size - self.window + 1) // self.size
        assert len(prefix.window) == depth - first
        for index, block in enumerate(prefix.window, first):
            assert self.content[block] == tuple(tokens[: (index + 1) * self.size])
        if self.pools.states is not None:
            return
        hashed = SequenceCache(self.pools, ROOT)
        hashed.find_prefix([*tokens, 0])
        for longer in range(depth + 1, prefix.num_pages + 1):
            seen = range(max(0, longer * self.size - self.window + 1) // self.size, longer)
            known = hashed.blocks.hashes(longer)
            assert not all(known[i] in self.windows._by_hash for i in seen)

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), size=st.integers(1, 6))
    def plan(self, data: st.DataObject, size: int) -> None:
        twin = data.draw(st.sampled_from(self.twins))
        if twin.planned == len(twin.tokens):
            twin.tokens = [*twin.tokens, data.draw(st.integers(0, 1))]
        size = min(size, len(twin.tokens) - twin.planned)
        end = twin.planned + size
        fits = self.pools.has(twin.cache.lacks(end))
        before = twin.cache.holdings
        grown = twin.cache.grow(end)
        assert grown == fits
        if not grown:
            assert twin.cache.holdings == before
            return
        assert twin.cache.windows is not None
        table = twin.cache.windows.block_ids
        in_use = {block for step in self.in_flight for block in step.reads}
        for index in range(twin.planned // self.size, (end - 1) // self.size + 1):
            block = table[index]
            sharers = sum(block in other.cache.holdings.window for other in self.twins)
            assert sharers == 1, "a block that somebody else reads is written"
            is_new = index * self.size >= twin.planned
            assert not (is_new and block in in_use), "a step in flight still reads it"
            self.content[block] = tuple(twin.tokens[: min(end, (index + 1) * self.size)])
        reads = {}
        first = max(0, twin.planned - self.window + 1) // self.size
        for index in range(first, (end - 1) // self.size + 1):
            assert table[index] != SCRATCH_BLOCK, "a block that is seen has been given back"
            known = tuple(twin.tokens[: min(end, (index + 1) * self.size)])
            assert self.content[table[index]] == known
            reads[table[index]] = known
        if self.pools.states is not None:
            moves = twin.cache.move_state(twin.planned, size, 0)
            assert self.states_of[moves.source] == tuple(twin.tokens[: twin.planned])
            for num_tokens, slot in moves.stores:
                self.states_of[slot] = tuple(twin.tokens[: twin.planned + num_tokens])
            self.held.append(twin.cache.take_unneeded())
        twin.planned = end
        self.in_flight.append(Step(twin, end, reads))

    @precondition(lambda self: self.in_flight)
    @rule()
    def retire(self) -> None:
        step = self.in_flight.popleft()
        for block, known in step.reads.items():
            assert self.content[block][: len(known)] == known, "a block was written under a step"
        if step.twin in self.twins:
            step.twin.cache.register(step.twin.tokens, step.end)
            self.held.append(step.twin.cache.take_unneeded())
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

    @precondition(lambda self: self.twins and not self.in_flight)
    @rule()
    def nothing_leaves_an_idle_sequence(self) -> None:
        for twin in self.twins:
            if twin.planned:
                assert twin.cache.num_leaving(twin.planned) == 0

    def release(self) -> None:
        for holdings in self.held:
            self.pools.release(holdings)
        self.held = []

    @invariant()
    def conserved(self) -> None:
        if not hasattr(self, "pools"):
            return
        self.pools.check([*(twin.cache.holdings for twin in self.twins), *self.held])
        in_flight = {id(step.twin): step for step in self.in_flight}
        for twin in self.twins:
            if id(twin) not in in_flight and twin.cache.windows is not None:
                most = blocks_of_window(self.window, self.size, 6)
                assert len(twin.cache.windows.held) <= most

    def teardown(self) -> None:
        if not hasattr(self, "pools"):
            return
        for twin in self.twins:
            self.held.append(twin.cache.detach(twin.tokens, twin.planned))
        self.release()
        self.pools.check([])
        assert self.windows.num_used == 0
        self.windows.allocate(self.windows.num_usable)


TestWindowMachine = WindowMachine.TestCase
TestWindowMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def pools(num_blocks: int = 33, window: int = 8) -> Pools:
    made = Pools(
        BlockPool(65, 4, make_policy("lru")),
        None,
        WindowPool(num_blocks, 4, window, make_policy("lru")),
    )
    made.blocks.on_eviction.append(made.windows.drop)  # type: ignore[union-attr]
    return made


def computed(made: Pools, prompt: list[int], output: list[int]) -> SequenceCache:
    """A sequence with its prompt in steps of four tokens and its output token by token."""
    cache = SequenceCache(made, ROOT)
    prefix = cache.find_prefix(prompt)
    end = len(prefix.blocks) * 4
    first = min(len(prompt), end + 4)
    assert cache.admit(prefix, prompt, first)
    tokens = [*prompt, *output]
    while end < len(tokens):
        end = min(end + 4, len(prompt)) if end < len(prompt) else end + 1
        assert cache.grow(end)
        cache.register(tokens, end)
    return cache


def test_a_long_sequence_holds_a_window_of_blocks() -> None:
    made = pools(num_blocks=6)
    tokens = list(range(99))
    cache = computed(made, tokens[:40], tokens[40:])
    assert len(cache.holdings.blocks) == 25
    assert len(cache.holdings.window) == 3
    made.release(cache.detach(tokens, len(tokens)))
    made.check([])


def test_the_next_turn_goes_on_behind_the_answer() -> None:
    made = pools()
    prompt, answer = list(range(30)), list(range(50, 73))
    tokens = prompt + answer
    made.release(computed(made, prompt, answer).detach(tokens, len(tokens)))
    found = SequenceCache(made, ROOT).find_prefix([*tokens, 99])
    assert (len(found.blocks), len(found.window)) == (13, 2)


def test_a_hit_ends_where_a_whole_window_is_cached() -> None:
    made = pools()
    tokens = list(range(40))
    made.release(computed(made, tokens, []).detach(tokens, len(tokens)))
    cache = SequenceCache(made, ROOT)
    hashes = cache.find_prefix([*tokens, 99]) and cache.blocks.hashes(10)
    assert made.windows is not None
    made.windows.drop(hashes[8])
    found = SequenceCache(made, ROOT).find_prefix([*tokens, 99])
    assert (len(found.blocks), found.num_pages, len(found.window)) == (8, 10, 2)
    made.windows.drop(hashes[6])
    # Behind block 8 one more is missing, but in front of that there is a window.
    found = SequenceCache(made, ROOT).find_prefix([*tokens, 99])
    assert (len(found.blocks), found.num_pages) == (6, 10)
    for each in hashes[:6:2]:
        made.windows.drop(each)
    assert not SequenceCache(made, ROOT).find_prefix([*tokens, 99]).blocks


def test_what_left_the_window_first_is_evicted_first() -> None:
    made = pools(num_blocks=12)
    tokens = list(range(40))
    cache = computed(made, tokens, [])
    made.release(cache.detach(tokens, len(tokens)))
    assert made.windows is not None
    made.windows.allocate(made.windows.num_free + 3)
    assert len(SequenceCache(made, ROOT).find_prefix([*tokens, 99]).blocks) == 10


def test_a_block_of_a_window_goes_with_the_block_of_its_hash() -> None:
    made = pools()
    tokens = list(range(40))
    made.release(computed(made, tokens, []).detach(tokens, len(tokens)))
    made.blocks.allocate(made.blocks.num_usable)
    assert made.windows is not None
    assert made.windows.num_free == made.windows.num_usable


@pytest.mark.parametrize(("window", "size"), [(1, 1), (1, 4), (2, 4), (4, 4), (5, 4), (128, 16)])
def test_blocks_of_a_window_are_enough_and_not_too_many(window: int, size: int) -> None:
    for num_tokens in (1, 2, 3, 7, 16):
        held = max(
            (end + num_tokens - 1) // size - max(0, end // size * size - window + 1) // size + 1
            for end in range(4 * (window + size))
        )
        assert blocks_of_window(window, size, num_tokens) == held
