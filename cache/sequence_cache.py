"""What is cached of one sequence: its blocks and, if the model has such layers, those of sliding
windows and its states.

A state cannot be cut back. So a prefix is as long as the deepest snapshot of a state, whatever
pages are found behind it, and snapshots are taken where the next prompt is likely to leave this
one. And it ends where the pages of a whole window are found in front of its end.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

from quire.cache.block_hash import BlockHash
from quire.cache.block_table import BlockTable
from quire.cache.pools import NO_NEEDS, Holdings, Needs, Pools
from quire.cache.state_table import HashBefore, StateMoves, StateTable
from quire.cache.window_table import WindowTable

# What chat templates put behind a conversation to begin the answer, and leave out or change once
# the answer is there: tokens, at most. A state behind it would not be found again.
_ANSWER_OPENING = 8


class Prefix(NamedTuple):
    """What of a prompt need not be computed.

    Attributes:
        blocks: that hold its keys and values.
        snapshot: slot of the state behind them, in models that have states.
        num_pages: blocks found, without regard to states and windows.
        window: the last of them that sliding windows see from there, in a pool of their own.
    """

    blocks: list[int]
    snapshot: int | None
    num_pages: int
    window: list[int]


NO_PREFIX = Prefix([], None, 0, [])


class SequenceCache:
    """Owns the blocks and slots of one sequence, from its admission until it gives them up."""

    __slots__ = ("_num_known", "_pools", "_positions", "_states", "blocks", "windows")

    def __init__(self, pools: Pools, root: BlockHash) -> None:
        self._pools = pools
        self.blocks = BlockTable(pools.blocks, root)
        self.windows = None if pools.windows is None else WindowTable(pools.windows)
        self._states = None if pools.states is None else StateTable(pools.states)
        self._positions: list[int] = []  # behind which a state is still to be kept
        self._num_known = 0  # tokens known when it was admitted

    def find_prefix(self, token_ids: Sequence[int]) -> Prefix:
        """Never covers the last token: its logits are wanted, so it is computed again."""
        _, states, windows = self._pools
        found = self.blocks.find_prefix(token_ids)
        depth, snapshot, window = len(found), None, list[int]()
        settled = states is None and windows is None
        while not settled:
            # Each may cut what the other has found.
            settled = True
            if windows is not None:
                depth, window = windows.deepest(self.blocks.hashes(depth))
            if states is not None:
                cut, snapshot = states.deepest(self.blocks.hashes(depth))
                settled = windows is None or cut == depth
                depth = cut
        return Prefix(found[:depth], snapshot, len(found), window)

    def coming(self, token_ids: Sequence[int]) -> list[BlockHash]:
        """Hashes that the prefixes of others may end with, once this sequence has got there."""
        if self._states is None:
            return self.blocks.unfinished(token_ids)
        hashes = (self.blocks.hash_before(position, token_ids) for position in self._positions)
        return [each for each in hashes if each is not None]

    def awaited(
        self,
        prefix: Prefix,
        token_ids: Sequence[int],
        coming: Collection[BlockHash],
        least: int,
    ) -> BlockHash | None:
        """The block to wait for, where running sequences compute enough of this prompt.

        Args:
            prefix: what is cached by now.
            coming: hashes that running sequences will register, see :meth:`coming`.
            least: tokens by which ``prefix`` must become longer; else waiting does not pay.

        Returns:
            The hash of a block in ``coming`` with blocks of about ``least`` tokens behind it that
            are coming too: until it is registered, the prompt need not be looked up again. None:
            do not wait.
        """
        size = self._pools.blocks.block_size
        if self._states is None:
            hashes = self.blocks.pending_hashes(prefix.num_pages, token_ids, coming)
        else:
            known = self.blocks.hashes((len(token_ids) - 1) // size)
            depths = (depth for depth, each in enumerate(known, 1) if each in coming)
            hashes = known[len(prefix.blocks) : max(depths, default=0)]
        if not hashes or len(hashes) * size < least:
            return None
        until = hashes[: max(1, len(hashes) - least // size + 1)]
        return next((each for each in reversed(until) if each in coming), hashes[-1])

    def admit(
        self,
        prefix: Prefix,
        token_ids: Sequence[int],
        num_tokens: int,
        reserve: Needs = NO_NEEDS,
    ) -> bool:
        """Begin with ``prefix`` and room for ``num_tokens``.

        Returns False, and changes nothing, if that would leave fewer than ``reserve`` blocks and
        those that all of ``token_ids`` will take, or if there is no slot.
        """
        if self._states is not None and not self._states.can_begin(prefix.snapshot):
            return False
        windows = self._pools.windows
        begun = self.blocks.blocks_for(num_tokens)
        rest = self.blocks.blocks_for(len(token_ids)) - begun
        if windows is not None:
            new = begun - len(prefix.blocks)
            if not windows.can_begin(prefix.window, new, rest, reserve.window):
                return False
        if not self.blocks.admit(prefix.blocks, num_tokens, reserve.blocks + rest):
            return False
        if self.windows is not None:
            self.windows.begin(prefix.window, len(prefix.blocks), num_tokens)
        if self._states is not None:
            self._states.begin(prefix.snapshot)
            self._num_known = len(token_ids)
            self._positions = self._worth_keeping(prefix)
        return True

    def lacks(self, num_tokens: int) -> Needs:
        """Blocks to make room for ``num_tokens`` in all."""
        window = 0 if self.windows is None else self.windows.blocks_for(num_tokens)
        return Needs(self.blocks.blocks_for(num_tokens), window)

    def will_lack(self, num_tokens: int) -> Needs:
        """Blocks to come until ``num_tokens`` are computed, beside those held."""
        blocks = self.blocks.blocks_for(num_tokens)
        return Needs(blocks, 0 if self.windows is None else self.windows.will_lack(blocks))

    def num_leaving(self, num_scheduled: int) -> int:
        """Blocks of windows that go when all steps planned so far, of ``num_scheduled`` leading
        tokens, have retired."""
        return 0 if self.windows is None else self.windows.num_leaving(num_scheduled)

    def grow(self, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` in all; False, and no change, if blocks are short."""
        if num_tokens <= self.blocks.num_tokens:
            return True
        if self.windows is None:
            return self.blocks.grow(num_tokens)
        if not self._pools.has(self.lacks(num_tokens)):
            return False
        self.windows.grow(num_tokens)
        return self.blocks.grow(num_tokens)

    def _worth_keeping(self, prefix: Prefix) -> list[int]:
        """Behind which of the known tokens a state is worth its slot.

        Where the next turn of a conversation leaves this one; where this prompt leaves another
        whose pages were found (Pan et al., Marconi, 2024); and now and then in between.
        """
        assert self._pools.states is not None
        size, spacing = self._pools.blocks.block_size, self._pools.states.spacing
        last = self._num_known - 1
        found = {*range(spacing, last + 1, spacing), prefix.num_pages * size}
        found |= {last // size * size, max(0, last - _ANSWER_OPENING) // size * size}
        return sorted(p for p in found if p > len(prefix.blocks) * size)

    def move_state(self, start: int, num_tokens: int, reserve: int) -> StateMoves:
        """What a step that computes these tokens does with the sequence's state, if it has one.

        Args:
            reserve: slots that states kept for others must leave available.
        """
        assert self._states is not None, "a model without recurrent layers"
        assert self._pools.states is not None
        end = start + num_tokens
        keep = [position for position in self._positions if start < position <= end]
        if end <= self._num_known:
            # Nobody uses them any more when this step has retired.
            reserve = min(reserve, 1)
        elif end % self._pools.blocks.block_size == 0:
            keep = [end]
        only_newest = end > self._num_known and end % self._pools.states.spacing != 0
        return self._states.advance(
            start, num_tokens, keep, reserve=reserve, only_newest=only_newest
        )

    def register(self, token_ids: Sequence[int], num_computed: int) -> None:
        """Let others find what ``num_computed`` leading tokens have filled.

        The steps of these tokens have retired.
        """
        self.blocks.register(token_ids, num_computed)
        if self.windows is not None:
            self.windows.register(self.blocks.known_hashes, num_computed)
        if self._states is not None:
            self._states.register(num_computed, self._hash_before(token_ids))
            self._positions = [p for p in self._positions if p > num_computed]

    def take_unneeded(self) -> Holdings:
        """What to release once all steps planned so far have retired."""
        return Holdings([], [] if self._states is None else self._states.take_unneeded(), [])

    def detach(self, token_ids: Sequence[int], num_scheduled: int) -> Holdings:
        """Give everything up; the caller must release it.

        Others find what ``num_scheduled`` leading tokens fill, those of the step in flight too: who
        reads that does so in a later step.
        """
        if self.blocks.block_ids:
            self.blocks.register(token_ids, min(num_scheduled, len(token_ids)))
        slots = []
        if self._states is not None:
            slots = self._states.detach(self._hash_before(token_ids))
        window = [] if self.windows is None else self.windows.detach()
        return Holdings(self.blocks.detach(), slots, window)

    @property
    def holdings(self) -> Holdings:
        slots = [] if self._states is None else self._states.slots
        window = [] if self.windows is None else self.windows.held
        return Holdings(self.blocks.block_ids.tolist(), slots, window)

    def _hash_before(self, token_ids: Sequence[int]) -> HashBefore:
        return partial(self.blocks.hash_before, token_ids=token_ids)
