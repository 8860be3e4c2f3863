"""The same figures under vLLM's names, for routers and dashboards that read those.

Names and labels as in vLLM's documentation of its production metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

_NAMES: Final = {
    "quire_requests_running": "num_requests_running",
    "quire_requests_waiting": "num_requests_waiting",
    "quire_kv_cache_utilization_ratio": "kv_cache_usage_perc",
    "quire_preemptions": "num_preemptions",
    "quire_prompt_tokens": "prompt_tokens",
    "quire_prompt_tokens_cached": "prompt_tokens_cached",
    "quire_generated_tokens": "generation_tokens",
    "quire_prefix_cache_query_tokens": "prefix_cache_queries",
    "quire_prefix_cache_hit_tokens": "prefix_cache_hits",
    "quire_requests": "request_success",
    "quire_time_to_first_token_seconds": "time_to_first_token_seconds",
    "quire_inter_token_latency_seconds": "inter_token_latency_seconds",
    "quire_time_per_output_token_seconds": "request_time_per_output_token_seconds",
    "quire_e2e_latency_seconds": "e2e_request_latency_seconds",
    "quire_queue_time_seconds": "request_queue_time_seconds",
    "quire_prefill_time_seconds": "request_prefill_time_seconds",
    "quire_decode_time_seconds": "request_decode_time_seconds",
    "quire_request_prompt_tokens": "request_prompt_tokens",
    "quire_request_generated_tokens": "request_generation_tokens",
    "quire_step_tokens": "iteration_tokens_total",
}
_LABELS: Final = {"model": "model_name", "finish_reason": "finished_reason"}


class WithVllmNames:
    """A registry's series, and after them those that vLLM has too."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        families = list(self._registry.collect())
        yield from families
        for family in families:
            if (name := _NAMES.get(family.name)) is not None:
                yield _renamed(family, f"vllm:{name}")


def _renamed(family: Metric, name: str) -> Metric:
    other = Metric(name, family.documentation, family.type)
    for sample in family.samples:
        labels = {_LABELS.get(label, label): text for label, text in sample.labels.items()}
        suffix = sample.name.removeprefix(family.name)
        other.add_sample(name + suffix, {**labels, "engine": "0"}, sample.value)
    return other
