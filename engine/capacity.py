"""How many blocks and slots a model has, on the device and in the pools that give them out."""

from __future__ import annotations

from quire.cache.block_pool import BlockPool
from quire.cache.eviction import make_policy, make_state_policy
from quire.cache.pools import Pools
from quire.cache.state_pool import StatePool
from quire.cache.window_pool import WindowPool, blocks_of_window
from quire.engine.config import EngineConfig
from quire.engine.memory.budget import SMALLEST_STEP
from quire.engine.messages import BLOCK_SECONDS_BOUNDS
from quire.engine.model.paged_model import PagedModel


class Capacity:
    """How many blocks and slots there are; allocates their pages, and makes pools that count them.

    Attributes:
        num_blocks: KV blocks, the scratch block included.
        num_window_blocks: of layers whose windows have blocks of their own, likewise.
        num_slots: for states of recurrent layers, the empty one included.
    """

    def __init__(self, config: EngineConfig, model: PagedModel) -> None:
        self.num_blocks = config.num_blocks
        self.num_window_blocks = config.num_window_blocks or config.num_blocks
        self.num_slots = config.num_state_slots or 1 + 2 * config.max_num_seqs
        self._config = config
        self._model = model

    def allocate(self) -> None:
        """Give the model's layers pages and states; on the thread that uses MLX."""
        self._model.allocate(
            self.num_blocks, self._config.block_size, self.num_slots, self.num_window_blocks
        )

    def make_pools(self) -> Pools:
        """Pools of as much, of which nothing is taken."""
        config, model = self._config, self._model
        states, windows = None, None
        if model.states is not None:
            policy = make_state_policy(config.eviction_policy)
            states = StatePool(self.num_slots, model.state_spacing, policy)
        if model.window is not None:
            policy = make_policy(config.eviction_policy)
            windows = WindowPool(self.num_window_blocks, config.block_size, model.window, policy)
        policy = make_policy(config.eviction_policy)
        blocks = BlockPool(self.num_blocks, config.block_size, policy, BLOCK_SECONDS_BOUNDS)
        return Pools(blocks, states, windows)

    def resize(self, num_blocks: int) -> None:
        """Have ``num_blocks`` KV blocks from the next allocation on.

        The number of blocks for windows changes by the same factor, but stays enough for a window
        and a step.
        """
        config, window = self._config, self._model.window
        self.num_blocks = num_blocks
        self.num_window_blocks = config.num_window_blocks or config.num_blocks
        if window is not None:
            least = 1 + blocks_of_window(window, config.block_size, SMALLEST_STEP)
            share = self.num_window_blocks * num_blocks // config.num_blocks
            self.num_window_blocks = min(self.num_window_blocks, max(least, share))
