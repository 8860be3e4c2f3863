"""The KV blocks of one sequence, in order of position, and the hashes of its full ones."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from itertools import takewhile

from quire.cache.block_hash import BlockHash, extend_chain
from quire.cache.block_pool import BlockPool


class BlockTable:
    """Owns one reference to each block in ``block_ids``; position p lives in block p // block_size.

    Tables only grow at the end. Shared blocks are full, so nobody ever writes to a shared block.
    """

    __slots__ = ("_hashes", "_num_registered", "_pool", "_root", "block_ids")

    def __init__(self, pool: BlockPool, root: BlockHash) -> None:
        self._pool = pool
        self._root = root
        self._hashes: list[BlockHash] = []
        self._num_registered = 0  # leading blocks that others can find
        self.block_ids = array("i")

    @property
    def num_tokens(self) -> int:
        """Tokens the blocks have room for."""
        return len(self.block_ids) * self._pool.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks the table lacks to hold ``num_tokens``."""
        return max(0, -(-num_tokens // self._pool.block_size) - len(self.block_ids))

    def find_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """Cached blocks that hold the head of ``token_ids``.

        Never covers the last token: its logits are wanted, so it is computed again.
        """
        extend_chain(self._hashes, self._root, token_ids, self._pool.block_size)
        return self._pool.match(self._hashes[: (len(token_ids) - 1) // self._pool.block_size])

    def misses(self, first: int, token_ids: Sequence[int]) -> tuple[int, int]:
        """How many blocks from the ``first`` on were cached once, and how many never.

        Like :meth:`find_prefix`, which must have been asked, it leaves out the last token.
        """
        hashes = self._hashes[first : (len(token_ids) - 1) // self._pool.block_size]
        lost = self._pool.count_lost(hashes)
        return lost, len(hashes) - lost

    def unfinished(self, token_ids: Sequence[int]) -> list[BlockHash]:
        """Hashes of the full blocks of ``token_ids`` that this table will register later."""
        return self._hashes[self._num_registered : len(token_ids) // self._pool.block_size]

    @property
    def known_hashes(self) -> Sequence[BlockHash]:
        """Of all full blocks, as far as they have been computed."""
        return self._hashes

    def hashes(self, num_blocks: int) -> list[BlockHash]:
        """Of the first blocks, after :meth:`find_prefix` was asked."""
        return self._hashes[:num_blocks]

    def hash_before(self, position: int, token_ids: Sequence[int]) -> BlockHash | None:
        """Of the block that ends at ``position``; None if its tokens are not known yet."""
        extend_chain(self._hashes, self._root, token_ids, self._pool.block_size)
        index = position // self._pool.block_size - 1
        return self._hashes[index] if index < len(self._hashes) else None

    def pending_hashes(
        self, first: int, token_ids: Sequence[int], coming: Collection[BlockHash]
    ) -> Sequence[BlockHash]:
        """Those of blocks from the ``first`` on, without a gap, that are in ``coming``.

        Like :meth:`find_prefix`, which must have been asked, it leaves out the last token.
        """
        hashes = self._hashes[first : (len(token_ids) - 1) // self._pool.block_size]
        return [*takewhile(coming.__contains__, hashes)]

    def admit(self, prefix: list[int], num_tokens: int, reserve: int = 0) -> bool:
        """Start an empty table with ``prefix`` and room for ``num_tokens``.

        Returns False, and changes nothing, if that would leave fewer than ``reserve`` available.
        """
        new = self.blocks_for(num_tokens) - len(prefix)
        if new + self._pool.num_idle(prefix) + reserve > self._pool.num_available:
            return False
        # The prefix first: allocating could otherwise evict the very blocks that were found.
        self._pool.acquire(prefix)
        self.block_ids.extend(prefix)
        self.block_ids.extend(self._pool.allocate(new))
        self._num_registered = len(prefix)
        return True

    def grow(self, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` in all; False, and no change, if blocks are short."""
        if num_tokens <= self.num_tokens:
            return True
        missing = self.blocks_for(num_tokens)
        if missing > self._pool.num_available:
            return False
        self.block_ids.extend(self._pool.allocate(missing))
        return True

    def register(self, token_ids: Sequence[int], num_computed: int) -> None:
        """Let others find the blocks that ``num_computed`` leading tokens have filled."""
        num_full = num_computed // self._pool.block_size
        if num_full <= self._num_registered:
            return
        extend_chain(self._hashes, self._root, token_ids, self._pool.block_size)
        for index in range(self._num_registered, num_full):
            parent = self.block_ids[index - 1] if index else None
            position = index * self._pool.block_size
            self._pool.register(self.block_ids[index], self._hashes[index], parent, position)
        self._num_registered = num_full

    def detach(self) -> list[int]:
        """Empty the table and hand its references to the caller, who must release them."""
        blocks = self.block_ids.tolist()
        self.block_ids = array("i")
        self._num_registered = 0
        return blocks
