"""The block pool and block tables keep their invariants over arbitrary histories."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.cache.block_hash import root_hash
from quire.cache.block_pool import BlockPool
from quire.cache.block_table import BlockTable
from quire.cache.eviction import make_policy

ROOT = root_hash("model")


def pool_of(num_blocks: int, block_size: int = 4, policy: str = "lru") -> BlockPool:
    return BlockPool(num_blocks, block_size, make_policy(policy))  # type: ignore[arg-type]


def filled(pool: BlockPool, tokens: list[int]) -> BlockTable:
    table = BlockTable(pool, ROOT)
    assert table.admit(table.find_prefix(tokens), len(tokens))
    table.register(tokens, len(tokens))
    return table


@dataclass
class Twin:
    """A table and the content its blocks must have, kept independently of the pool."""

    table: BlockTable
    tokens: list[int]
    computed: int
    copies: dict[int, int] = field(default_factory=dict)


class PoolMachine(RuleBasedStateMachine):
    """Random admissions, growth, forks and releases against a model of the blocks' content."""

    @initialize(
        num_blocks=st.integers(2, 24),
        block_size=st.integers(1, 5),
        policy=st.sampled_from(["lru", "fifo", "cost"]),
    )
    def start(self, num_blocks: int, block_size: int, policy: str) -> None:
        self.pool = pool_of(num_blocks, block_size, policy)
        self.twins: list[Twin] = []
        self.content: dict[int, list[int]] = {}  # block -> all tokens up to its end

    def write(self, twin: Twin, upto: int) -> None:
        """Do what the device would: fill the slots of newly computed positions."""
        size = self.pool.block_size
        for position in range(twin.computed, upto):
            block = twin.table.block_ids[position // size]
            sharers = sum(block in other.table.block_ids for other in self.twins)
            assert sharers <= 1, "wrote to a shared block"
            self.content[block] = twin.tokens[: position + 1]
        twin.computed = upto
        twin.table.register(twin.tokens, upto)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=30), reserve=st.integers(0, 2))
    def admit(self, tokens: list[int], reserve: int) -> None:
        table = BlockTable(self.pool, ROOT)
        prefix = table.find_prefix(tokens)
        size = self.pool.block_size
        assert len(prefix) * size < len(tokens), "a hit must leave the last token to compute"
        for index, block in enumerate(prefix):
            assert self.content[block] == tokens[: (index + 1) * size], "a hit with foreign text"
        before = self.pool.num_available
        if table.admit(prefix, len(tokens), reserve):
            twin = Twin(table, tokens, len(prefix) * size)
            self.twins.append(twin)
            self.write(twin, len(tokens))
        else:
            assert self.pool.num_available == before
            assert not table.block_ids

    @precondition(lambda self: self.twins)
    @rule(data=st.data(), extra=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def grow(self, data: st.DataObject, extra: list[int]) -> None:
        twin = data.draw(st.sampled_from(self.twins))
        if twin.table.grow(len(twin.tokens) + len(extra)):
            twin.tokens = twin.tokens + extra
            self.write(twin, len(twin.tokens))

    @precondition(lambda self: self.twins)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        twin = data.draw(st.sampled_from(self.twins))
        self.twins.remove(twin)
        self.pool.release(twin.table.detach())

    @invariant()
    def conserved(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check(twin.table.block_ids for twin in self.twins)
        size = self.pool.block_size
        for twin in self.twins:
            for index, block in enumerate(twin.table.block_ids):
                upto = min((index + 1) * size, twin.computed)
                if upto > index * size:
                    assert self.content[block][:upto] == twin.tokens[:upto]

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for twin in self.twins:
            self.pool.release(twin.table.detach())
        self.pool.check([])
        assert self.pool.num_used == 0
        assert self.pool.num_available == self.pool.num_usable
        # Every last block can be had, so no cached block is stuck behind another.
        self.pool.allocate(self.pool.num_usable)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_same_prefix_is_shared_by_reference() -> None:
    pool = pool_of(16)
    first = filled(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = filled(pool, [1, 2, 3, 4, 5, 6, 7, 8, 10])
    assert first.block_ids[:2] == second.block_ids[:2]
    assert first.block_ids[2] != second.block_ids[2]
    assert pool.num_used == 4


def test_a_full_hit_leaves_the_last_token_to_compute() -> None:
    pool = pool_of(16)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    filled(pool, tokens)
    assert len(BlockTable(pool, ROOT).find_prefix(tokens)) == 1
    assert len(BlockTable(pool, ROOT).find_prefix([*tokens, 9])) == 2


@pytest.mark.parametrize("other", [root_hash("other"), root_hash("model", salt="tenant")])
def test_roots_never_share(other: bytes) -> None:
    pool = pool_of(16)
    filled(pool, list(range(12)))
    assert BlockTable(pool, other).find_prefix(list(range(12))) == []  # type: ignore[arg-type]


def test_root_hash_keeps_its_parts_apart() -> None:
    assert root_hash("ab", "c") != root_hash("a", "bc")


def cached_tokens(pool: BlockPool, tokens: list[int]) -> int:
    return len(BlockTable(pool, ROOT).find_prefix([*tokens, 0])) * pool.block_size


def fill_and_release(pool: BlockPool, tokens: list[int]) -> None:
    pool.release(filled(pool, tokens).detach())


@pytest.mark.parametrize("policy", ["lru", "fifo", "cost"])
def test_tails_go_before_heads(policy: str) -> None:
    pool = pool_of(9, policy=policy)
    chain = list(range(100, 132))
    fill_and_release(pool, chain)
    for expected in range(28, -1, -4):
        pool.allocate(1)
        assert cached_tokens(pool, chain) == expected


def test_lru_keeps_what_was_used_last() -> None:
    pool = pool_of(5, policy="lru")
    old, new = [1] * 8, [2] * 8
    fill_and_release(pool, old)
    fill_and_release(pool, new)
    fill_and_release(pool, [*old, 3])  # touches old, needs a fifth block: evicts the tail of new
    assert cached_tokens(pool, old) == 8
    assert cached_tokens(pool, new) == 4


def test_fifo_ignores_later_use() -> None:
    pool = pool_of(5, policy="fifo")
    old, new = [1] * 8, [2] * 8
    fill_and_release(pool, old)
    fill_and_release(pool, new)
    pool.release(pool_hit(pool, old))
    pool.allocate(2)
    assert cached_tokens(pool, old) == 0
    assert cached_tokens(pool, new) == 8


def test_cost_keeps_what_is_used_often() -> None:
    pool = pool_of(5, policy="cost")
    popular, once = [1] * 8, [2] * 8
    fill_and_release(pool, popular)
    for _ in range(3):
        pool.release(pool_hit(pool, popular))
    fill_and_release(pool, once)
    pool.allocate(2)
    assert cached_tokens(pool, popular) == 8
    assert cached_tokens(pool, once) == 0


def test_cost_lets_old_fame_fade() -> None:
    pool = pool_of(5, policy="cost")
    popular = [1] * 4
    fill_and_release(pool, popular)
    for _ in range(3):
        pool.release(pool_hit(pool, popular))
    for fresh in range(10, 60):
        fill_and_release(pool, [fresh] * 12)
    assert cached_tokens(pool, popular) == 0


def pool_hit(pool: BlockPool, tokens: list[int]) -> list[int]:
    table = BlockTable(pool, ROOT)
    prefix = table.find_prefix([*tokens, 0])
    assert len(prefix) * pool.block_size == len(tokens)
    pool.acquire(prefix)
    return prefix


def test_what_is_forgotten_is_free_and_not_found() -> None:
    pool = pool_of(8)
    table = filled(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    with pytest.raises(ValueError, match="in use"):
        pool.forget()
    pool.release(table.detach())
    assert pool.num_cached == 2
    pool.forget()
    pool.check([])
    assert (pool.num_free, pool.num_cached) == (7, 0)
    assert cached_tokens(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 0


def test_a_refused_admission_takes_nothing() -> None:
    pool = pool_of(4)
    table = BlockTable(pool, ROOT)
    assert not table.admit([], 13)
    assert not table.admit([], 9, reserve=1)
    assert pool.num_available == 3
    assert table.admit([], 12)


def test_misuse_is_an_error() -> None:
    pool = pool_of(4)
    with pytest.raises(ValueError, match="4 blocks wanted, 3 available"):
        pool.allocate(4)
    with pytest.raises(ValueError, match="not in use"):
        pool.release([1])
    with pytest.raises(ValueError, match="no content"):
        pool.acquire([1])


def test_what_was_evicted_is_told_from_what_was_never_there() -> None:
    pool = BlockPool(5, 4, make_policy("lru"), (60.0,))
    old = filled(pool, list(range(16)))
    pool.release(old.detach())
    pool.release(filled(pool, list(range(100, 116))).detach())  # takes the place of the first
    assert pool.num_evictions == 4
    assert pool.lifetimes.counts == pool.idle_times.counts == [4, 0]
    for tokens, expected in (
        ([*range(16), 0], (4, 0)),
        ([*range(8), *range(50, 59)], (2, 2)),
        (list(range(200, 217)), (0, 4)),
        ([*range(100, 116), 0], (0, 0)),
    ):
        table = BlockTable(pool, ROOT)
        found = table.find_prefix(tokens)
        assert table.misses(len(found), tokens) == expected
