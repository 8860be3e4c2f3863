"""Blocks of layers with sliding windows, which are given back when no token can see them any more.

They have the hashes of the other layers' blocks, which hold the same tokens, but each is found by
itself: to go on behind a prefix takes the window's blocks in front of its end and no others.
"""

from __future__ import annotations

from collections.abc import Sequence

from quire.cache.block_hash import BlockHash
from quire.cache.block_pool import BlockPool
from quire.cache.eviction import EvictionPolicy


class WindowPool(BlockPool):
    """Hands out blocks like any pool; evicts those nobody uses in any order."""

    def __init__(
        self, num_blocks: int, block_size: int, window: int, policy: EvictionPolicy
    ) -> None:
        """``window``: tokens that a row sees in these layers, itself included."""
        super().__init__(num_blocks, block_size, policy)
        self.window = window
        self.most_held = blocks_of_window(window, block_size)  # by a sequence that decodes

    def first_block(self, position: int) -> int:
        """The first block that the token at ``position`` sees."""
        return max(0, position - self.window + 1) // self.block_size

    def deepest(self, hashes: Sequence[BlockHash]) -> tuple[int, list[int]]:
        """How many blocks of the chain ``hashes`` one can go on behind, and the ids of those that
        are seen from there."""
        depth = place = len(hashes)
        found: list[int] = []
        while place > self.first_block(depth * self.block_size):
            place -= 1
            block = self._by_hash.get(hashes[place])
            if block is None:
                depth, found = place, []
            else:
                found.append(block)
        return depth, found[::-1]

    def can_begin(self, found: Sequence[int], new: int, rest: int, reserve: int) -> bool:
        """Whether a sequence can take ``found`` and so many ``new`` blocks, the ``rest`` later, and
        leave ``reserve``."""
        rest = min(rest, max(0, self.most_held - len(found) - new))
        return new + self.num_idle(found) + rest + reserve <= self.num_available


def blocks_of_window(window: int, block_size: int, num_tokens: int = 1) -> int:
    """Blocks that a sequence holds at most while it computes ``num_tokens`` in a step.

    The tokens may begin anywhere in a block, and what is seen from that block's beginning is kept.
    """
    return -(-(window - 1) // block_size) + (num_tokens + block_size - 2) // block_size + 1


def longest_step(window: int, block_size: int, num_blocks: int) -> int:
    """Tokens that a sequence can compute in a step with so many blocks; 0 or less: none."""
    return (num_blocks - -(-(window - 1) // block_size) - 1) * block_size + 1
