"""The series of each model that the front end counts itself. Label children are made beforehand."""

from __future__ import annotations

import time
from collections import deque
from typing import Final, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram

from quire.engine.messages import FinishReason, WorkerStats
from quire.serve.worker_mirror import WorkerMirror

_SHORT: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0),
)
# A small model on a fast chip is at 2 ms per token.
_PER_TOKEN: Final = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0),
)
_LONG: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)
_TOKENS: Final = tuple(float(2**power) for power in range(18))
_REJECTIONS: Final = ("queue_full", "key_share", "loading", "restarting", "draining")
_RATE_SECONDS: Final = 10

_HISTOGRAMS: Final = {
    "time_to_first_token_seconds": ("From submission to the first token.", _SHORT),
    "queue_time_seconds": ("From submission to the first step.", _SHORT),
    "prefill_time_seconds": ("From the first step to the first token.", _SHORT),
    "decode_time_seconds": ("From the first token to the last.", _LONG),
    "inter_token_latency_seconds": ("Between one token of a request and the next.", _PER_TOKEN),
    "time_per_output_token_seconds": (
        "Of a request: its decode time by its tokens after the first.",
        _PER_TOKEN,
    ),
    "e2e_latency_seconds": ("From submission to the end of the request.", _LONG),
    "request_prompt_tokens": ("Prompt tokens of one request.", _TOKENS),
    "request_generated_tokens": ("Tokens generated for one request.", _TOKENS),
}
_COUNTERS: Final = {
    "prompt_tokens": "Prompt tokens of started requests.",
    "prompt_tokens_cached": "Prompt tokens whose KV came from the prefix cache.",
    "generated_tokens": "Tokens generated.",
    "worker_restarts": "Times the worker was replaced.",
}


class ModelFamilies:
    """The families in the registry, which all models share."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.histograms = {
            name: Histogram(f"quire_{name}", help, ("model",), buckets=buckets, registry=registry)
            for name, (help, buckets) in _HISTOGRAMS.items()
        }
        self.counters = {
            name: Counter(f"quire_{name}", help, ("model",), registry=registry)
            for name, help in _COUNTERS.items()
        }
        self.requests = Counter(
            "quire_requests", "Finished requests.", ("model", "finish_reason"), registry=registry
        )
        self.rejections = Counter(
            "quire_admission_rejections",
            "Requests turned away.",
            ("model", "reason"),
            registry=registry,
        )


class Rate:
    """How many a second, over the last ten seconds."""

    def __init__(self) -> None:
        self._counts: deque[tuple[int, float]] = deque()  # by the second, oldest first

    def add(self, count: float, now: float) -> None:
        second = int(now)
        if self._counts and self._counts[-1][0] == second:
            self._counts[-1] = second, self._counts[-1][1] + count
            return
        self._counts.append((second, count))
        while self._counts[0][0] < second - _RATE_SECONDS:
            self._counts.popleft()

    def value(self) -> float:
        """Whole seconds count, not the one that has just begun."""
        now = int(time.monotonic())
        return sum(n for second, n in self._counts if now - _RATE_SECONDS <= second < now) / (
            _RATE_SECONDS
        )


class ModelMetrics:
    """What one model's requests are counted in."""

    def __init__(self, name: str, families: ModelFamilies) -> None:
        self.worker = WorkerMirror()
        histograms = {key: family.labels(name) for key, family in families.histograms.items()}
        counters = {key: family.labels(name) for key, family in families.counters.items()}
        self.time_to_first_token = histograms["time_to_first_token_seconds"]
        self.queue_time = histograms["queue_time_seconds"]
        self.prefill_time = histograms["prefill_time_seconds"]
        self.decode_time = histograms["decode_time_seconds"]
        self.inter_token_latency = histograms["inter_token_latency_seconds"]
        self.time_per_output_token = histograms["time_per_output_token_seconds"]
        self.e2e_latency = histograms["e2e_latency_seconds"]
        self.request_prompt_tokens = histograms["request_prompt_tokens"]
        self.request_generated_tokens = histograms["request_generated_tokens"]
        self.prompt_tokens_cached = counters["prompt_tokens_cached"]
        self.worker_restarts = counters["worker_restarts"]
        self._prompt_tokens = counters["prompt_tokens"]
        self._generated_tokens = counters["generated_tokens"]
        self._prompt_rate, self._generated_rate, self._busy_rate = Rate(), Rate(), Rate()
        self._busy_seconds = 0.0  # of the worker that runs now
        self.worker.rates = {
            "prompt_tokens_per_second": self._prompt_rate.value,
            "generated_tokens_per_second": self._generated_rate.value,
            "host_busy_ratio": self._busy_rate.value,
        }
        self.requests: dict[FinishReason, Counter] = {
            reason: families.requests.labels(name, reason) for reason in get_args(FinishReason)
        }
        self.admission_rejections = {
            reason: families.rejections.labels(name, reason) for reason in _REJECTIONS
        }

    def snapshot(self, stats: WorkerStats, now: float) -> None:
        """What the worker says of itself after a step."""
        self.worker.stats = stats
        step = stats.step
        busy = step.schedule_seconds + step.build_seconds + step.emit_seconds
        before = self._busy_seconds if busy >= self._busy_seconds else 0.0  # 0: a new worker
        self._busy_rate.add(busy - before, now)
        self._busy_seconds = busy

    def add_prompt(self, num_tokens: int, now: float) -> None:
        """``now`` is on the monotonic clock."""
        self._prompt_tokens.inc(num_tokens)
        self._prompt_rate.add(num_tokens, now)

    def add_generated(self, num_tokens: int, now: float) -> None:
        self._generated_tokens.inc(num_tokens)
        if num_tokens:
            self._generated_rate.add(num_tokens, now)
