"""Reference-counted KV blocks with a prefix index.

A block is free (no content worth keeping), cached (found by its hash, used by nobody) or used (in
at least one block table). Block 0 is scratch: padding rows write there and it is never handed out.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from quire.cache.block_hash import BlockHash
from quire.cache.eviction import EvictionPolicy
from quire.cache.tally import Tally

SCRATCH_BLOCK = 0


@dataclass(slots=True)
class CachedBlock:
    """What the pool remembers of a block that can be found by its hash."""

    block: int
    block_hash: BlockHash
    position: int  # tokens in front of the block
    cached_at: int
    # The one before it in the chain, if whoever registered this one held that one too.
    parent: CachedBlock | None = None
    uses: int = 1
    children: int = 0  # cached blocks whose parent this is
    priority: float = 0.0  # given when the last reference went away
    ticket: int = 0  # matches the newest heap entry; older entries are void
    made: float = field(default_factory=time.monotonic)  # seconds
    left: float = 0.0  # seconds, when the last reference went away


class BlockPool:
    """Hands out block ids 1..num_blocks-1 and takes them back.

    Allocation takes free blocks first and then evicts cached ones, lowest priority first.

    Attributes:
        num_evictions: so far.
        on_eviction: each is called with the hash of each evicted block.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        policy: EvictionPolicy,
        time_bounds: Sequence[float] = (),
    ) -> None:
        """``time_bounds``, in seconds, are those of :attr:`lifetimes` and :attr:`idle_times`."""
        if num_blocks < 2:
            raise ValueError("a block pool needs a scratch block and at least one more")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_evictions = 0
        self.on_eviction: list[Callable[[BlockHash], None]] = []
        self.lifetimes = Tally(time_bounds)
        self.idle_times = Tally(time_bounds)
        # Hashes of blocks evicted lately, to tell what was lost from what was never there.
        self._evicted: dict[BlockHash, None] = {}
        self._policy = policy
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))
        self._cached: dict[int, CachedBlock] = {}
        self._by_hash: dict[BlockHash, int] = {}
        self._num_idle = 0  # cached blocks with no reference
        self._heap: list[tuple[float, int, int]] = []  # (priority, ticket, block)
        self._clock = 0

    # ---- counts

    @property
    def num_usable(self) -> int:
        """All blocks but the scratch block."""
        return self.num_blocks - 1

    @property
    def num_available(self) -> int:
        """Blocks that :meth:`allocate` can hand out now, evicting if need be."""
        return len(self._free) + self._num_idle

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return self._num_idle

    @property
    def num_used(self) -> int:
        return self.num_usable - self.num_available

    # ---- prefix lookup

    def match(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The blocks of the longest cached prefix of the chain ``hashes``."""
        blocks = []
        for block_hash in hashes:
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def count_lost(self, hashes: Iterable[BlockHash]) -> int:
        """How many of ``hashes``, which follow a prefix that is cached, were cached once."""
        return sum(each in self._evicted or each in self._by_hash for each in hashes)

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of ``blocks`` would leave the available ones when acquired."""
        return sum(self._refs[block] == 0 for block in blocks)

    # ---- ownership

    def acquire(self, blocks: Sequence[int]) -> None:
        """Add a reference to each of ``blocks``, which hold content or another reference."""
        for block in blocks:
            cached = self._cached.get(block)
            if self._refs[block] == 0:
                if cached is None:
                    raise ValueError(f"block {block} is free; it has no content to share")
                self._num_idle -= 1
                cached.ticket = 0
            if cached is not None:
                cached.uses += 1
            self._refs[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks with one reference each and no content.

        Raises:
            ValueError: fewer are available; nothing was taken.
        """
        if count > self.num_available:
            raise ValueError(f"{count} blocks wanted, {self.num_available} available")
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each of ``blocks``, given in order of position."""
        self._clock += 1
        for block in reversed(blocks):
            if self._refs[block] <= 0:
                raise ValueError(f"block {block} is not in use")
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            cached = self._cached.get(block)
            if cached is None:
                self._free.append(block)
                continue
            self._num_idle += 1
            cached.left = time.monotonic()
            cached.priority = self._policy.priority(
                cached.cached_at, self._clock, cached.position, cached.uses
            )
            self._offer(block)

    def register(
        self, block: int, block_hash: BlockHash, parent: int | None, position: int
    ) -> None:
        """Let others find a block in use, whose content is finished, by its hash.

        If somebody uses a block of the same hash, that one is found and this one stays private; if
        nobody does, this one takes its place: idle, it could be evicted in front of others of its
        chain that are in use, which nobody would find any more. ``parent`` is the block before it
        in the same table.
        """
        if block in self._cached:
            return
        self._clock += 1
        found = self._by_hash.get(block_hash)
        if found is None:
            cached = CachedBlock(block, block_hash, position, cached_at=self._clock)
        elif self._refs[found]:
            return
        else:
            cached = self._cached.pop(found)
            cached.block, cached.ticket = block, 0
            cached.uses += 1
            self._num_idle -= 1
            self._free.append(found)
        self._cached[block] = cached
        self._by_hash[block_hash] = block
        # Without an entry it is a private duplicate, whose eviction breaks no chain.
        self._put_behind(cached, None if parent is None else self._cached.get(parent))

    def _put_behind(self, cached: CachedBlock, parent: CachedBlock | None) -> None:
        """Make ``parent`` the one that is not evicted before this one."""
        before, cached.parent = cached.parent, parent
        if parent is not None:
            parent.children += 1
        if before is not None:
            before.children -= 1
            if self._refs[before.block] == 0:
                self._offer(before.block)

    # ---- eviction

    def _offer(self, block: int) -> None:
        """Make an idle block a candidate for eviction, unless cached blocks build on it."""
        cached = self._cached[block]
        if cached.children:
            return
        self._clock += 1
        cached.ticket = self._clock
        heapq.heappush(self._heap, (cached.priority, cached.ticket, block))
        if len(self._heap) > 4 * self.num_blocks:
            self._heap = [entry for entry in self._heap if self._is_current(entry)]
            heapq.heapify(self._heap)

    def _is_current(self, entry: tuple[float, int, int]) -> bool:
        _, ticket, block = entry
        cached = self._cached.get(block)
        return cached is not None and cached.ticket == ticket

    def _evict(self) -> int:
        while True:
            entry = heapq.heappop(self._heap)
            if self._is_current(entry):
                break
        priority, _, block = entry
        self._policy.evicted(priority)
        self.num_evictions += 1
        self._num_idle -= 1
        cached = self._cached.pop(block)
        block_hash = cached.block_hash
        del self._by_hash[block_hash]
        for tell in self.on_eviction:
            tell(block_hash)
        now = time.monotonic()
        self.lifetimes.add(now - cached.made)
        self.idle_times.add(now - cached.left)
        self._remember([block_hash])
        self._put_behind(cached, None)
        return block

    def drop(self, block_hash: BlockHash) -> None:
        """Free the block of that hash, on which no cached block builds, unless it is in use."""
        block = self._by_hash.get(block_hash)
        if block is None or self._refs[block]:
            return
        del self._by_hash[block_hash], self._cached[block]
        self._num_idle -= 1
        self._free.append(block)

    def forget(self, num_blocks: int | None = None) -> None:
        """Free all blocks, none of which is in use: pages hold no longer what the hashes say.

        From then on there are ``num_blocks``; None: as many as before.
        """
        if self.num_used:
            raise ValueError(f"{self.num_used} blocks are in use")
        self.num_blocks = num_blocks or self.num_blocks
        self._remember(self._by_hash)
        self._refs = [0] * self.num_blocks
        self._free = list(range(self.num_blocks - 1, 0, -1))
        self._cached.clear()
        self._by_hash.clear()
        self._heap.clear()
        self._num_idle = 0

    def _remember(self, lost: Iterable[BlockHash]) -> None:
        self._evicted.update(dict.fromkeys(lost))
        while len(self._evicted) > self.num_blocks:
            del self._evicted[next(iter(self._evicted))]

    # ---- invariants

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert conservation against every block table that exists. For tests and debug runs."""
        held = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a block stands twice in one table"
            for block in table:
                held[block] += 1
        assert held == self._refs, "reference counts differ from the tables"
        assert held[SCRATCH_BLOCK] == 0, "the scratch block was handed out"
        free = set(self._free)
        idle = {block for block in self._cached if self._refs[block] == 0}
        used = {block for block in range(self.num_blocks) if self._refs[block]}
        assert len(free) == len(self._free), "a block is free twice"
        assert len(idle) == self._num_idle, "idle cached blocks were miscounted"
        assert not free & (idle | used), "a free block is cached or in use"
        assert len(free) + len(idle) + len(used) == self.num_usable, "a block was lost"
        assert {b: c.block_hash for b, c in self._cached.items()} == {
            b: n for n, b in self._by_hash.items()
        }, "the prefix index and the blocks disagree"
        children = [0] * self.num_blocks
        for cached in self._cached.values():
            if (parent := cached.parent) is not None:
                is_there = self._cached.get(parent.block) is parent
                assert is_there, "a cached block lost its parent first"
                children[parent.block] += 1
        candidates = {entry[2] for entry in self._heap if self._is_current(entry)}
        for block, cached in self._cached.items():
            assert cached.block == block, "a cached block is another one's"
            assert cached.children == children[block], "children were miscounted"
            is_leaf = self._refs[block] == 0 and cached.children == 0
            assert is_leaf == (block in candidates), "a leaf cannot be evicted, or a non-leaf can"
