"""Series that mirror workers, each worker's read from one snapshot so that they agree.

A worker's totals start at zero with every process; what earlier ones counted is added, so the
exported counters never go backwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from quire.engine.messages import (
    BLOCK_SECONDS_BOUNDS,
    STEP_SECONDS_BOUNDS,
    STEP_TOKENS_BOUNDS,
    Histogram,
    PoolStats,
    Ready,
    WorkerStats,
)
from quire.serve.process_memory import resident_bytes

Labels = dict[str, str]
# Name, further labels, help, and where a snapshot has it.
_COUNTERS: Sequence[tuple[str, Labels, str, Callable[[WorkerStats], float]]] = (
    ("steps", {}, "Steps the engine has run.", lambda s: s.steps),
    (
        "preemptions",
        {},
        "Requests put back into the queue because the KV blocks ran out.",
        lambda s: s.preemptions,
    ),
    (
        "memory_faults",
        {},
        "Steps that the device had no memory for; they were tried again or ended their requests.",
        lambda s: s.memory_faults,
    ),
    ("evictions", {}, "Cached KV blocks given to a new owner.", lambda s: s.cache.evictions),
    (
        "prefix_cache_query_tokens",
        {},
        "Prompt tokens looked up in the prefix cache.",
        lambda s: s.cache.lookups.queries,
    ),
    (
        "prefix_cache_hit_tokens",
        {},
        "Prompt tokens found in the prefix cache.",
        lambda s: s.cache.lookups.hits,
    ),
    (
        "prefix_cache_page_hit_tokens",
        {},
        "Prompt tokens whose pages were found, with or without a recurrent layer's state and the "
        "pages of sliding windows.",
        lambda s: (
            s.cache.lookups.hits + s.cache.lookups.missed_state + s.cache.lookups.missed_window
        ),
    ),
    *(
        (
            "prefix_cache_miss_tokens",
            {"reason": reason},
            "Prompt tokens not found: evicted, never seen, behind the last full block, or with "
            "pages but without a recurrent layer's state or the pages of a sliding window.",
            read,
        )
        for reason, read in (
            ("evicted", lambda s: s.cache.lookups.missed_evicted),
            ("new", lambda s: s.cache.lookups.missed_new),
            ("tail", lambda s: s.cache.lookups.missed_tail),
            ("state", lambda s: s.cache.lookups.missed_state),
            ("window", lambda s: s.cache.lookups.missed_window),
        )
    ),
    *(
        (
            "step_part_seconds",
            {"part": part},
            "Time of the worker's serving thread, by what it did; device_wait is the device's.",
            read,
        )
        for part, read in (
            ("schedule", lambda s: s.step.schedule_seconds),
            ("build", lambda s: s.step.build_seconds),
            ("device_wait", lambda s: s.step.wait_seconds),
            ("emit", lambda s: s.step.emit_seconds),
        )
    ),
)
_HISTOGRAMS: Sequence[tuple[str, str, Sequence[float], Callable[[WorkerStats], Histogram]]] = (
    ("step_duration_seconds", "Of one step.", STEP_SECONDS_BOUNDS, lambda s: s.step.seconds),
    ("step_tokens", "Tokens computed in one step.", STEP_TOKENS_BOUNDS, lambda s: s.step.tokens),
    (
        "kv_block_lifetime_seconds",
        "From a cached block's completion to its eviction.",
        BLOCK_SECONDS_BOUNDS,
        lambda s: s.cache.lifetimes,
    ),
    (
        "kv_block_idle_before_evict_seconds",
        "From a cached block's last use to its eviction.",
        BLOCK_SECONDS_BOUNDS,
        lambda s: s.cache.idle_times,
    ),
)


class WorkerMirror:
    """What is known of one model's worker."""

    def __init__(self) -> None:
        self.stats: WorkerStats | None = None
        self.in_flight: Callable[[], int] = lambda: 0
        self.eviction_policy = "lru"
        self.pid: int | None = None
        self.info: Ready | None = None
        self.is_wanted = True  # whether the model is in memory or on its way there
        self.rates: Mapping[str, Callable[[], float]] = {}  # by the name of their gauge
        self._last_step: float | None = None  # monotonic
        self._counted = [0.0] * len(_COUNTERS)  # by earlier workers
        self._observed = [_empty(bounds) for _, _, bounds, _ in _HISTOGRAMS]

    def ready(self, info: Ready) -> None:
        self.info = info

    def mark_step(self, now: float) -> None:
        self._last_step = now

    def lost(self) -> None:
        self._counted, self._observed = self.counters(), self.histograms()
        self.stats = self.info = self.pid = None

    def counters(self) -> list[float]:
        stats = self.stats
        return [
            before + (read(stats) if stats else 0)
            for before, (_, _, _, read) in zip(self._counted, _COUNTERS, strict=True)
        ]

    def histograms(self) -> list[Histogram]:
        stats = self.stats
        if stats is None:
            return self._observed
        return [
            _sum(before, read(stats))
            for before, (_, _, _, read) in zip(self._observed, _HISTOGRAMS, strict=True)
        ]

    def gauges(self) -> dict[str, float]:
        stats, info = self.stats, self.info
        idle = self._last_step is None or not self.in_flight()
        used = stats.blocks_used if stats else 0
        return {
            "model_loaded": self.is_wanted,
            **({"model_ready": info is not None} if self.is_wanted else {}),
            "model_max_tokens": info.max_model_len if info else 0,
            "kernel_fallbacks": info.abilities.num_dropped_kernels if info else 0,
            "requests_running": stats.requests_running if stats else 0,
            "requests_waiting": stats.requests_waiting if stats else 0,
            "kv_cache_utilization_ratio": used / max(info.num_blocks, 1) if info else 0,
            "last_step_age_seconds": 0 if idle else time.monotonic() - (self._last_step or 0),
            **{name: rate() for name, rate in self.rates.items()},
        }

    def blocks(self) -> dict[str, int]:
        stats = self.stats
        if stats is None:
            return _untouched(self.info.num_blocks if self.info else 0)
        return {
            "used": stats.blocks_used,
            "cached": stats.blocks_cached,
            "free": stats.blocks_free,
        }

    def state_slots(self) -> dict[str, int]:
        found = self.stats.states if self.stats else None
        return _by_state(found, self.info.states.num_slots if self.info else 0)

    def window_blocks(self) -> dict[str, int]:
        found = self.stats.windows if self.stats else None
        return _by_state(found, self.info.num_window_blocks if self.info else 0)

    def memory(self) -> dict[str, int]:
        kinds = ("active", "cache", "peak", "weights", "kv_cache", "states", "process")
        memory = dict.fromkeys(kinds, 0)
        if info := self.info:
            memory |= {
                "weights": info.weight_bytes,
                "kv_cache": info.kv_cache_bytes,
                "states": info.states.nbytes,
            }
            if (limits := info.limits) is not None:
                memory |= {
                    "activations": limits.activations,
                    "limit": limits.limit,
                    "cache_limit": limits.cache,
                    "wired_limit": limits.wired,
                }
        if stats := self.stats:
            memory |= {
                "active": stats.memory_active,
                "cache": stats.memory_cache,
                "peak": stats.memory_peak,
            }
        if self.pid is not None:
            memory["process"] = resident_bytes(self.pid)
        return memory


_GAUGES = {
    "model_loaded": "1 while the model is in memory, or on its way there.",
    "model_ready": "1 while the worker takes requests; of models that are loaded.",
    "model_max_tokens": "Prompt + output tokens of one request; 0 while not ready.",
    "kernel_fallbacks": (
        "Kernels that are not used because they compute something wrong on this machine."
    ),
    "requests_running": "Requests in the worker's batch.",
    "requests_waiting": "Requests queued in the worker.",
    "kv_cache_utilization_ratio": "KV blocks in use, of all.",
    "prompt_tokens_per_second": "Prompt tokens of requests that began, over the last 10 s.",
    "generated_tokens_per_second": "Tokens generated, over the last 10 s.",
    "host_busy_ratio": (
        "Share of the last 10 s in which the worker's serving thread computed, and waited neither "
        "for the device nor for requests."
    ),
    "last_step_age_seconds": (
        "Time since the worker's last step while requests are in flight, else 0."
    ),
}


def _by_state(pool: PoolStats | None, size: int) -> dict[str, int]:
    """Units of a pool of ``size``, of which nothing else may be known yet."""
    if pool is None:
        return _untouched(size)
    return {"used": pool.used, "cached": pool.cached, "free": pool.free}


def _untouched(size: int) -> dict[str, int]:
    """The first of a pool's units is never given out."""
    return {"used": 0, "cached": 0, "free": max(0, size - 1)}


class WorkerCollector(Collector):
    """All workers' series, each with the name of its model."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerMirror] = {}

    def collect(self) -> Iterator[Metric]:
        workers = list(self.workers.items())
        gauges = {name: _gauge(name, help) for name, help in _GAUGES.items()}
        info = _gauge("model_info", "What is served; always 1.", "architecture", "device", "dtype")
        blocks = _gauge("kv_blocks", "KV blocks by state.", "state")
        slots = _gauge("state_slots", "Slots for states of recurrent layers, by state.", "state")
        windows = _gauge(
            "kv_window_blocks", "KV blocks of layers with sliding windows, by state.", "state"
        )
        memory = _gauge(
            "memory_bytes", "Memory by kind; process is what the system charges.", "kind"
        )
        for model, worker in workers:
            for name, value in worker.gauges().items():
                gauges[name].add_metric((model,), float(value))
            if ready := worker.info:
                info.add_metric((model, ready.architecture, ready.device, ready.dtype), 1)
            for state, count in worker.blocks().items():
                blocks.add_metric((model, state), count)
            for state, count in worker.state_slots().items():
                slots.add_metric((model, state), count)
            for state, count in worker.window_blocks().items():
                windows.add_metric((model, state), count)
            for kind, size in worker.memory().items():
                memory.add_metric((model, kind), size)
        yield from (*gauges.values(), info, blocks, windows, slots, memory)
        yield from _counter_families(workers)
        yield from _histogram_families(workers)


def _counter_families(workers: Iterable[tuple[str, WorkerMirror]]) -> Iterable[Metric]:
    families: dict[str, CounterMetricFamily] = {}
    for model, worker in workers:
        for (name, more, help, _), value in zip(_COUNTERS, worker.counters(), strict=True):
            labels = more | ({"policy": worker.eviction_policy} if name == "evictions" else {})
            family = families.get(name)
            if family is None:
                family = CounterMetricFamily(f"quire_{name}", help, labels=("model", *labels))
                families[name] = family
            family.add_metric((model, *labels.values()), value)
    return families.values()


def _histogram_families(workers: Iterable[tuple[str, WorkerMirror]]) -> Iterator[Metric]:
    observed = [(model, worker.histograms()) for model, worker in workers]
    for place, (name, help, bounds, _) in enumerate(_HISTOGRAMS):
        family = HistogramMetricFamily(f"quire_{name}", help, labels=("model",))
        for model, histograms in observed:
            counts = accumulate(histograms[place].counts)
            edges = [*map(str, map(float, bounds)), "+Inf"]
            buckets: Any = list(zip(edges, counts, strict=True))
            family.add_metric((model,), buckets, histograms[place].total)
        yield family


def _gauge(name: str, help: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"quire_{name}", help, labels=("model", *labels))


def _empty(bounds: Sequence[float]) -> Histogram:
    return Histogram([0] * (len(bounds) + 1), 0.0)


def _sum(left: Histogram, right: Histogram) -> Histogram:
    counts = [a + b for a, b in zip(left.counts, right.counts, strict=True)]
    return Histogram(counts, left.total + right.total)
