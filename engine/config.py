"""What an engine is told of its model's pages and of its steps."""

from __future__ import annotations

from dataclasses import dataclass

from quire.cache.eviction import PolicyName


@dataclass(frozen=True)
class EngineConfig:
    num_blocks: int  # KV blocks, the scratch block included
    block_size: int = 16  # tokens per block
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    # Rows of prompts times their contexts, of a step. None: any.
    max_attended: int | None = None
    eviction_policy: PolicyName = "lru"
    # Blocks that stay when the machine is short of memory. None: all.
    least_blocks: int | None = None
    # Slots for states of recurrent layers, the empty one included. None: two for each sequence.
    num_state_slots: int | None = None
    # KV blocks of layers with sliding windows, likewise. None: as many as others have.
    num_window_blocks: int | None = None
    # Encode a step while the one before it runs. None: where kernels write the pages in place. Not
    # elsewhere: MLX would copy pages that the running step still holds, and on the CPU encoding is
    # computing.
    encode_ahead: bool | None = None
