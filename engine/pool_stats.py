"""What the pools and the prefix cache tell of themselves."""

from __future__ import annotations

from quire.cache.pools import Pools
from quire.cache.state_pool import StatePool
from quire.cache.window_pool import WindowPool
from quire.engine.lookups import Lookups
from quire.engine.messages import CacheStats, Histogram, PoolStats


def cache_stats(pools: Pools, lookups: Lookups) -> CacheStats:
    pool = pools.blocks
    return CacheStats(
        queries=lookups.queries,
        hits=lookups.hits,
        missed_evicted=lookups.missed_evicted,
        missed_new=lookups.missed_new,
        missed_tail=lookups.missed_tail,
        evictions=pool.num_evictions,
        lifetimes=Histogram(list(pool.lifetimes.counts), pool.lifetimes.total),
        idle_times=Histogram(list(pool.idle_times.counts), pool.idle_times.total),
        missed_state=lookups.missed_state,
        missed_window=lookups.missed_window,
    )


def pool_stats(pool: StatePool | WindowPool | None) -> PoolStats | None:
    return None if pool is None else PoolStats(pool.num_used, pool.num_cached, pool.num_free)
