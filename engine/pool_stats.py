"""What the pools and the prefix cache tell of themselves."""

from __future__ import annotations

from copy import copy

from quire.cache.pools import Pools
from quire.cache.state_pool import StatePool
from quire.cache.window_pool import WindowPool
from quire.engine.messages import CacheStats, Histogram, Lookups, PoolStats


def cache_stats(pools: Pools, lookups: Lookups) -> CacheStats:
    pool = pools.blocks
    return CacheStats(
        lookups=copy(lookups),
        evictions=pool.num_evictions,
        lifetimes=Histogram(list(pool.lifetimes.counts), pool.lifetimes.total),
        idle_times=Histogram(list(pool.idle_times.counts), pool.idle_times.total),
    )


def pool_stats(pool: StatePool | WindowPool | None) -> PoolStats | None:
    return None if pool is None else PoolStats(pool.num_used, pool.num_cached, pool.num_free)
