"""The states of one sequence: the one behind its newest token, and those kept for others.

A state is never copied. To keep one, the next is written to another slot: what the sequence read
from stays as it is, a snapshot of all tokens up to there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from quire.cache.block_hash import BlockHash
from quire.cache.state_pool import EMPTY_SLOT, StatePool

# The hash of the block that ends at a position, if it is known.
HashBefore = Callable[[int], BlockHash | None]


class StateMoves(NamedTuple):
    """What a step does with the state of one chunk.

    Attributes:
        source: slot of the state before its first token.
        stores: (tokens of the chunk, slot for the state behind them), in order; the last one is
            behind all of them.
    """

    source: int
    stores: tuple[tuple[int, int], ...]


class StateTable:
    """Owns one reference to each of its slots."""

    __slots__ = ("_current", "_kept", "_newest", "_next", "_pool", "_slots")

    def __init__(self, pool: StatePool) -> None:
        self._pool = pool
        self._slots: set[int] = set()
        self._current = EMPTY_SLOT  # the state behind all tokens that were scheduled
        self._next = EMPTY_SLOT  # where the one behind the next chunk goes
        # Kept for others, by position, until they are registered.
        self._kept: dict[int, int] = {}
        self._newest: dict[int, int] = {}  # of the output: at most one, registered when it ends

    @property
    def slots(self) -> list[int]:
        return list(self._slots)

    def can_begin(self, snapshot: int | None) -> bool:
        """Whether there is a slot to go on in."""
        found = [] if snapshot is None else [snapshot]
        return self._pool.num_available > self._pool.num_idle(found)

    def begin(self, snapshot: int | None) -> None:
        """Go on behind ``snapshot``, or from the first token.

        Raises:
            ValueError: there is no slot; see :meth:`can_begin`.
        """
        if snapshot is not None:
            # First: allocating could otherwise evict it.
            self._pool.acquire([snapshot])
            self._slots.add(snapshot)
            self._current = snapshot
        self._next = self._allocate()

    def advance(
        self, start: int, num_tokens: int, keep: Sequence[int], *, reserve: int, only_newest: bool
    ) -> StateMoves:
        """Plan a chunk.

        Args:
            start: position of its first token.
            keep: positions behind tokens of the chunk, in order, whose states are worth keeping.
            reserve: slots to leave available.
            only_newest: whether the newest of such states is, and no other.
        """
        if reserve and not self._pool.num_available:
            self._newest = {}  # in its slot somebody who waits can begin
        source, target, end = self._current, self._next, start + num_tokens
        self._current = target
        stores = []
        for position in keep:
            if self._pool.num_available <= reserve:
                break
            slot = self._allocate()
            if position == end:
                slot, self._next = target, slot
            else:
                stores.append((position - start, slot))
            if only_newest:
                self._newest = {position: slot}
            else:
                self._kept[position] = slot
        return StateMoves(source, (*stores, (num_tokens, target)))

    def register(self, num_computed: int, hash_before: HashBefore) -> None:
        """Let others find the states kept of the ``num_computed`` leading tokens."""
        for position in [p for p in self._kept if p <= num_computed]:
            self._register_slot(position, self._kept.pop(position), hash_before)

    def take_unneeded(self) -> list[int]:
        """Hand references to the caller, who must release them once all steps planned so far have
        retired."""
        needed = {self._current, self._next, *self._kept.values(), *self._newest.values()}
        unneeded = self._slots - needed
        self._slots &= needed
        return list(unneeded)

    def detach(self, hash_before: HashBefore) -> list[int]:
        """Register what is kept, empty the table and hand its references to the caller.

        States of the step in flight are among them: who reads them does so in a later step.
        """
        for position, slot in {**self._kept, **self._newest}.items():
            self._register_slot(position, slot, hash_before)
        slots = self.slots
        self._slots, self._kept, self._newest = set(), {}, {}
        self._current = self._next = EMPTY_SLOT
        return slots

    def _allocate(self) -> int:
        (slot,) = self._pool.allocate(1)
        self._slots.add(slot)
        return slot

    def _register_slot(self, position: int, slot: int, hash_before: HashBefore) -> None:
        block_hash = hash_before(position)
        if block_hash is not None:
            self._pool.register(slot, block_hash, None, position)
