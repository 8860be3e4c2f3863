"""The limits that MLX is given: while a model loads, and once it serves."""

from __future__ import annotations

import mlx.core as mx

from quire.engine.memory.budget import Budget
from quire.engine.messages import MemoryLimits

# MLX's own default on the CPU is 32 MiB. A step frees and takes far more, and getting it from the
# system anew costs page faults: 134 instead of 48 ms at 8 x 896 tokens.
_LOADING_CACHE = 1 << 30


def limit_loading(budget: Budget) -> None:
    """Before anything is loaded: let nothing that follows take more than the budget."""
    mx.set_memory_limit(budget.limit)
    mx.set_cache_limit(min(_LOADING_CACHE, budget.limit // 8))
    if budget.device == "metal":
        mx.set_wired_limit(budget.limit)


def limit_serving(budget: Budget, pools: int) -> MemoryLimits:
    """After the warm-up: give its buffers back, and set the limits of a model that serves.

    On GPUs MLX gives freed buffers back before it passes the memory limit, and everywhere it waits
    for work to finish before it allocates beyond.

    Args:
        pools: bytes that they have taken.
    """
    held = budget.weights + pools + budget.activations
    cache = budget.cache_bytes(pools)
    # --kv-cache-memory may go beyond the fraction.
    limit = max(budget.limit, held + cache)
    mx.clear_cache()
    mx.set_cache_limit(cache)
    mx.set_memory_limit(limit)
    wired = 0
    if budget.device == "metal":
        # Resident, so that no step waits for pages; beyond what the system recommends is an error.
        wired = min(held + cache, budget.usable)
        mx.set_wired_limit(wired)
    return MemoryLimits(
        usable=budget.usable,
        limit=limit,
        activations=budget.activations,
        cache=cache,
        wired=wired,
    )
