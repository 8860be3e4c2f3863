"""Slots for the states of recurrent layers, as blocks are for keys and values.

A state is of a fixed size and stands for all tokens before some position. So a slot takes the place
of a block, but each is found by itself: by the hash of the block that it stands behind.
"""

from __future__ import annotations

from collections.abc import Sequence

from quire.cache.block_hash import BlockHash
from quire.cache.block_pool import BlockPool
from quire.cache.eviction import EvictionPolicy

# Holds zeros, the state of a sequence that begins; never handed out.
EMPTY_SLOT = 0
MIN_SLOTS = 3  # the empty one, a snapshot and what goes on behind it


class StatePool(BlockPool):
    """Hands out slots 1..num_slots-1 and takes them back; evicts snapshots nobody begins from.

    A snapshot goes with the block it stands behind: without that one it cannot be found.
    """

    def __init__(self, num_slots: int, spacing: int, policy: EvictionPolicy) -> None:
        """
        Args:
            spacing: tokens between snapshots of a long prompt, a multiple of the block size.

        Raises:
            ValueError: there are too few to go on behind a snapshot.
        """
        if num_slots < MIN_SLOTS:
            raise ValueError(f"a pool of states needs at least {MIN_SLOTS} slots")
        super().__init__(num_slots, 1, policy)
        self.spacing = spacing

    def deepest(self, hashes: Sequence[BlockHash]) -> tuple[int, int | None]:
        """How many blocks of the chain ``hashes`` the deepest snapshot stands behind, and its slot;
        without one 0 and None."""
        for depth in range(len(hashes), 0, -1):
            slot = self._by_hash.get(hashes[depth - 1])
            if slot is not None:
                return depth, slot
        return 0, None
