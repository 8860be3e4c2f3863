"""The blocks of one sequence in layers with sliding windows."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from quire.cache.block_hash import BlockHash
from quire.cache.block_pool import SCRATCH_BLOCK
from quire.cache.window_pool import WindowPool


class WindowTable:
    """Owns one reference to each of its blocks; position p lives in block p // block_size.

    Attributes:
        block_ids: of all positions; the scratch block where no token to come sees the block.
    """

    __slots__ = ("_first", "_num_registered", "_pool", "block_ids")

    def __init__(self, pool: WindowPool) -> None:
        self._pool = pool
        self._first = 0  # blocks in front are not held
        self._num_registered = 0  # leading blocks that others may find, held or not
        self.block_ids = array("i")

    @property
    def held(self) -> list[int]:
        return self.block_ids[self._first :].tolist()

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks the table lacks to hold the last of ``num_tokens``."""
        return max(0, -(-num_tokens // self._pool.block_size) - len(self.block_ids))

    def will_lack(self, num_blocks: int) -> int:
        """Blocks to take, beside those held, until the table is longer by ``num_blocks``: those
        that it gives back on the way are taken again."""
        return min(num_blocks, max(0, self._pool.most_held - len(self.block_ids) + self._first))

    def num_leaving(self, num_scheduled: int) -> int:
        """Blocks that go when all steps planned so far, of ``num_scheduled`` leading tokens, have
        retired."""
        return max(0, self._first_needed(num_scheduled) - self._first)

    def begin(self, prefix: Sequence[int], depth: int, num_tokens: int) -> None:
        """Start an empty table behind ``depth`` blocks, the last of them being ``prefix``.

        Raises:
            ValueError: there are no blocks for ``num_tokens``.
        """
        # First: allocating could otherwise evict the very blocks that were found.
        self._pool.acquire(prefix)
        self._first = depth - len(prefix)
        self._num_registered = depth
        self.block_ids = array("i", [SCRATCH_BLOCK] * self._first)
        self.block_ids.extend(prefix)
        self.grow(num_tokens)

    def grow(self, num_tokens: int) -> None:
        """Make room for ``num_tokens`` in all. Raises ValueError if blocks are short."""
        self.block_ids.extend(self._pool.allocate(self.blocks_for(num_tokens)))

    def register(self, hashes: Sequence[BlockHash], num_computed: int) -> None:
        """Let others find the blocks that ``num_computed`` leading tokens have filled, and let go
        of those that no token behind them sees.

        All steps of these tokens have retired, and any step in flight is of tokens behind them.

        Args:
            hashes: of the full blocks.
        """
        num_full = num_computed // self._pool.block_size
        if num_full <= self._num_registered:
            return
        for index in range(self._num_registered, num_full):
            position = index * self._pool.block_size
            self._pool.register(self.block_ids[index], hashes[index], None, position)
        self._num_registered = num_full
        needed = self._first_needed(num_computed)
        if needed > self._first:
            for index in range(self._first, needed):
                # One by one, so that the first in the sequence are the first to be evicted.
                self._pool.release([self.block_ids[index]])
                self.block_ids[index] = SCRATCH_BLOCK
            self._first = needed

    def detach(self) -> list[int]:
        """Empty the table and hand its references to the caller, who must release them."""
        blocks = self.held
        self.block_ids = array("i")
        self._first = self._num_registered = 0
        return blocks

    def _first_needed(self, num_tokens: int) -> int:
        """The first block that is seen from the last full one of so many tokens: whoever begins
        with all of these goes on there."""
        size = self._pool.block_size
        return min(self._pool.first_block(num_tokens // size * size), len(self.block_ids))
