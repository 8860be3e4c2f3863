"""The pools that a model's sequences take blocks and slots from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from quire.cache.block_pool import BlockPool
from quire.cache.state_pool import StatePool
from quire.cache.window_pool import WindowPool


class Holdings(NamedTuple):
    """References that a sequence gives up."""

    blocks: list[int]
    slots: list[int]
    window: list[int]


class Needs(NamedTuple):
    """Numbers of blocks, in the pool of all layers but those with windows, and in that of these."""

    blocks: int = 0
    window: int = 0

    def plus(self, other: Needs) -> Needs:
        return Needs(self.blocks + other.blocks, self.window + other.window)


NO_NEEDS = Needs()


class Pools(NamedTuple):
    """The pools of one model.

    Attributes:
        blocks: of layers that see all tokens.
        states: slots, of models with recurrent layers.
        windows: of layers with sliding windows; None: these have no blocks of their own.
    """

    blocks: BlockPool
    states: StatePool | None = None
    windows: WindowPool | None = None

    def release(self, holdings: Holdings) -> None:
        self.blocks.release(holdings.blocks)
        if self.states is not None:
            self.states.release(holdings.slots)
        if self.windows is not None:
            self.windows.release(holdings.window)

    def has(self, needs: Needs) -> bool:
        """Whether so many blocks can be handed out."""
        windows = 0 if self.windows is None else self.windows.num_available
        return needs.blocks <= self.blocks.num_available and needs.window <= windows

    def forget(self, num_blocks: int | None = None, num_window_blocks: int | None = None) -> None:
        """As :meth:`BlockPool.forget`."""
        self.blocks.forget(num_blocks)
        if self.states is not None:
            self.states.forget()
        if self.windows is not None:
            self.windows.forget(num_window_blocks)

    def check(self, owned: Sequence[Holdings]) -> None:
        """As :meth:`BlockPool.check`."""
        self.blocks.check(holdings.blocks for holdings in owned)
        if self.states is not None:
            self.states.check(holdings.slots for holdings in owned)
        if self.windows is not None:
            self.windows.check(holdings.window for holdings in owned)
