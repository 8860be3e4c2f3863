"""The exposition: formats, names, labels that clients cannot invent, totals that only grow."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from quire.engine.messages import (
    BLOCK_SECONDS_BOUNDS,
    STEP_SECONDS_BOUNDS,
    STEP_TOKENS_BOUNDS,
    Abilities,
    CacheStats,
    Histogram,
    Lookups,
    MemoryLimits,
    PoolStats,
    Ready,
    StepStats,
    WorkerStats,
)
from quire.serve import model_metrics
from quire.serve.metrics import HTTPMetricsMiddleware, Metrics
from quire.serve.request_record import RequestRecord
from quire.serve.worker_mirror import WorkerMirror

READY = Ready("llama", "cpu", "float32", 100, 2048, 4, 16, 50, 1000, 2000)
MODEL = "m"
NESTED = ("cache", "step", "states", "windows")
OWN = [name for name in WorkerStats.__struct_fields__ if name not in NESTED]
LOOKUPS = Lookups.__struct_fields__


def histogram(bounds: Sequence[float], place: int | None = None, value: float = 0.0) -> Histogram:
    counts = [0] * (len(bounds) + 1)
    if place is not None:
        counts[place] = 1
    return Histogram(counts, value)


def stats(**values: Any) -> WorkerStats:
    lookups = Lookups(*[values.pop(name, 0) for name in LOOKUPS])
    evictions = values.pop("evictions", 0)
    blocks = histogram(BLOCK_SECONDS_BOUNDS, **values.pop("block", {}))
    times = values.pop("times", (0.0,) * 4)
    seconds = histogram(STEP_SECONDS_BOUNDS, **values.pop("duration", {}))
    return WorkerStats(
        **{**dict.fromkeys(OWN, 0), **values},
        cache=CacheStats(lookups, evictions, lifetimes=blocks, idle_times=blocks),
        step=StepStats(*times, seconds=seconds, tokens=histogram(STEP_TOKENS_BOUNDS)),
    )


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"quire_{name}", {"model": MODEL, **labels})


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics()
    metrics.for_model(MODEL)
    return metrics


@pytest.fixture
def worker(metrics) -> WorkerMirror:
    return metrics.for_model(MODEL).worker


def test_the_format_follows_the_accept_header():
    metrics = Metrics()
    text, text_type = metrics.render("*/*")
    assert text_type.startswith("text/plain; version=0.0.4")
    assert list(parse_text(text.decode()))
    accept = "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;q=0.5"
    body, body_type = metrics.render(accept)
    assert body_type.startswith("application/openmetrics-text")
    assert list(parse_openmetrics(body.decode()))


@settings(deadline=None)
@given(st.text())
def test_no_accept_header_breaks_it(accept):
    body, content_type = Metrics().render(accept)
    assert b"quire_build_info" in body
    assert "\n" not in content_type


def test_it_answers_while_loading_and_says_so(metrics, worker):
    assert value(metrics, "model_ready") == 0
    assert value(metrics, "requests_running") == 0
    worker.ready(READY)
    assert value(metrics, "model_ready") == 1
    assert value(metrics, "kv_blocks", state="free") == 49  # the scratch block is nobody's
    assert value(metrics, "memory_bytes", kind="weights") == 1000


def test_the_limits_of_memory_are_shown(metrics, worker):
    limits = MemoryLimits(usable=9000, limit=8000, activations=700, cache=600, wired=5000)
    worker.ready(msgspec.structs.replace(READY, limits=limits))
    kinds = {"limit": 8000, "activations": 700, "cache_limit": 600, "wired_limit": 5000}
    assert {k: value(metrics, "memory_bytes", kind=k) for k in kinds} == kinds
    worker.lost()
    assert value(metrics, "memory_bytes", kind="limit") is None


def test_what_the_system_charges_for_the_worker_is_shown(metrics, worker):
    worker.pid = os.getpid()
    assert value(metrics, "memory_bytes", kind="process") > 2**20
    worker.lost()
    assert value(metrics, "memory_bytes", kind="process") == 0


def test_the_gauges_mirror_one_snapshot(metrics, worker):
    worker.ready(READY)
    worker.eviction_policy = "fifo"
    numbers = {
        name: position for position, name in enumerate([*OWN, "evictions", *LOOKUPS], start=1)
    }
    worker.stats = stats(**numbers)
    reasons = ("evicted", "new", "tail", "state", "window")
    seen = {
        "requests_running": value(metrics, "requests_running"),
        "requests_waiting": value(metrics, "requests_waiting"),
        **{f"blocks_{s}": value(metrics, "kv_blocks", state=s) for s in ("used", "cached", "free")},
        **{
            f"memory_{k}": value(metrics, "memory_bytes", kind=k)
            for k in ("active", "cache", "peak")
        },
        "steps": value(metrics, "steps_total"),
        "preemptions": value(metrics, "preemptions_total"),
        "memory_faults": value(metrics, "memory_faults_total"),
        "evictions": value(metrics, "evictions_total", policy="fifo"),
        "queries": value(metrics, "prefix_cache_query_tokens_total"),
        "hits": value(metrics, "prefix_cache_hit_tokens_total"),
        **{
            f"missed_{r}": value(metrics, "prefix_cache_miss_tokens_total", reason=r)
            for r in reasons
        },
    }
    assert seen == numbers
    assert value(metrics, "kv_cache_utilization_ratio") == numbers["blocks_used"] / 50
    page_hits = numbers["hits"] + numbers["missed_state"] + numbers["missed_window"]
    assert value(metrics, "prefix_cache_page_hit_tokens_total") == page_hits


def test_slots_of_states_are_shown(metrics, worker):
    worker.ready(READY)
    slots = {"used": 101, "cached": 102, "free": 103}
    worker.stats = stats(hits=4, missed_state=6, states=PoolStats(**slots))
    assert value(metrics, "prefix_cache_page_hit_tokens_total") == 10
    assert value(metrics, "prefix_cache_miss_tokens_total", reason="state") == 6
    assert {state: value(metrics, "state_slots", state=state) for state in slots} == slots


def test_blocks_of_windows_are_shown(metrics, worker):
    worker.ready(msgspec.structs.replace(READY, num_window_blocks=7))
    assert value(metrics, "kv_window_blocks", state="free") == 6
    blocks = {"used": 101, "cached": 102, "free": 103}
    worker.stats = stats(hits=4, missed_window=6, windows=PoolStats(**blocks))
    assert value(metrics, "prefix_cache_page_hit_tokens_total") == 10
    assert value(metrics, "prefix_cache_miss_tokens_total", reason="window") == 6
    seen = {state: value(metrics, "kv_window_blocks", state=state) for state in blocks}
    assert seen == blocks


def test_where_the_time_of_steps_went(metrics, worker):
    worker.ready(READY)
    worker.stats = stats(times=(1.0, 2.0, 3.0, 4.0), duration={"place": 2, "value": 0.0025})
    parts = ("schedule", "build", "device_wait", "emit")
    seen = [value(metrics, "step_part_seconds_total", part=part) for part in parts]
    assert seen == [1.0, 2.0, 3.0, 4.0]
    buckets = {
        edge: value(metrics, "step_duration_seconds_bucket", le=edge)
        for edge in ("0.001", "0.002", "0.003", "30.0", "+Inf")
    }
    assert buckets == {"0.001": 0, "0.002": 0, "0.003": 1, "30.0": 1, "+Inf": 1}
    assert value(metrics, "step_duration_seconds_sum") == 0.0025
    worker.lost()
    worker.ready(READY)
    worker.stats = stats(times=(1.0,) * 4, duration={"place": 0, "value": 0.001})
    assert value(metrics, "step_part_seconds_total", part="emit") == 5.0
    assert value(metrics, "step_duration_seconds_count") == 2


def test_a_lost_worker_leaves_no_gauge_behind_and_takes_no_count_away(metrics, worker):
    worker.ready(READY)
    worker.stats = stats(preemptions=5, evictions=7, requests_running=3, requests_waiting=2)
    worker.lost()
    assert value(metrics, "preemptions_total") == 5
    assert value(metrics, "requests_running") == value(metrics, "requests_waiting") == 0
    assert value(metrics, "kv_blocks", state="used") == 0
    worker.ready(READY)
    worker.stats = stats(preemptions=1, evictions=2)
    assert value(metrics, "preemptions_total") == 6
    assert value(metrics, "evictions_total", policy="lru") == 9
    worker.lost()
    worker.lost()
    assert value(metrics, "preemptions_total") == 6


def test_the_age_of_the_last_step_counts_only_while_requests_run(metrics, worker):
    worker.mark_step(1.0)  # long ago
    assert value(metrics, "last_step_age_seconds") == 0
    worker.in_flight = lambda: 1
    assert value(metrics, "last_step_age_seconds") > 0


def test_tokens_per_second_are_those_of_the_last_seconds(metrics, monkeypatch):
    now = 100.0
    monkeypatch.setattr(model_metrics.time, "monotonic", lambda: now)
    model = metrics.for_model(MODEL)
    for second in range(20):
        model.add_generated(50, now + second)
        model.add_prompt(10, now + second)
    now = 120.0
    assert value(metrics, "generated_tokens_per_second") == 50
    assert value(metrics, "prompt_tokens_per_second") == 10
    now = 125.0
    assert value(metrics, "generated_tokens_per_second") == 25
    now = 1000.0
    assert value(metrics, "generated_tokens_per_second") == 0


def test_the_share_of_time_that_the_host_is_busy(metrics, monkeypatch):
    now = 100.0
    monkeypatch.setattr(model_metrics.time, "monotonic", lambda: now)
    model = metrics.for_model(MODEL)
    model.snapshot(stats(times=(1.0, 1.0, 50.0, 0.0)), 100.0)
    model.snapshot(stats(times=(1.0, 2.0, 90.0, 1.0)), 104.0)
    now = 105.0
    assert value(metrics, "host_busy_ratio") == pytest.approx(0.4)
    model.worker.lost()
    model.snapshot(stats(times=(0.0, 0.0, 1.0, 0.5)), 106.0)  # of another worker
    now = 107.0
    assert value(metrics, "host_busy_ratio") == pytest.approx(0.45)
    now = 1000.0
    assert value(metrics, "host_busy_ratio") == 0


def test_kernels_that_are_not_used_and_the_front_ends_memory(metrics, worker):
    assert value(metrics, "kernel_fallbacks") == 0
    worker.ready(msgspec.structs.replace(READY, abilities=Abilities(num_dropped_kernels=2)))
    assert value(metrics, "kernel_fallbacks") == 2
    text = metrics.render("")[0].decode()
    (size,) = re.findall(r"^quire_front_end_memory_bytes (\S+)", text, re.MULTILINE)
    assert float(size) > 2**20


def test_each_model_has_series_of_its_own(metrics):
    for number, name in enumerate(("a", "b"), start=1):
        metrics.for_model(name).add_generated(number, 0.0)
        metrics.for_model(name).worker.ready(READY)
    for number, name in enumerate(("a", "b"), start=1):
        assert value(metrics, "generated_tokens_total", model=name) == number
        assert value(metrics, "model_ready", model=name) == 1
    assert metrics.for_model("a") is metrics.for_model("a")


def test_vllms_names_show_the_same_figures(worker):
    metrics = Metrics(vllm_names=True)
    model = metrics.for_model(MODEL)
    model.worker.ready(READY)
    model.worker.stats = stats(requests_running=3, queries=7, hits=5)
    model.add_generated(9, 0.0)
    model.requests["stop"].inc()
    model.time_to_first_token.observe(0.3)
    text = metrics.render("")[0].decode()
    labels = 'engine="0",model_name="m"'
    for line in (
        f"vllm:num_requests_running{{{labels}}} 3.0",
        f"vllm:prefix_cache_queries_total{{{labels}}} 7.0",
        f"vllm:prefix_cache_hits_total{{{labels}}} 5.0",
        f"vllm:generation_tokens_total{{{labels}}} 9.0",
        'vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 1.0',
        f"vllm:time_to_first_token_seconds_count{{{labels}}} 1.0",
        f"vllm:time_to_first_token_seconds_sum{{{labels}}} 0.3",
    ):
        assert line in text.splitlines(), line
    families = {family.name for family in parse_openmetrics(openmetrics_text(metrics))}
    assert {"vllm:kv_cache_usage_perc", "quire_requests_running"} <= families
    assert "vllm:" not in Metrics().render("")[0].decode()


def openmetrics_text(metrics: Metrics) -> str:
    return metrics.render("application/openmetrics-text")[0].decode()


def test_refusals_before_a_worker_and_clients_that_leave_are_counted(metrics):
    def ended(status: str, code: str = "", reasons: Sequence[str] = ()) -> None:
        record = RequestRecord("id", "client", model=MODEL, error_code=code)
        record.finish_reasons = [*reasons]
        metrics.ended(record, status)

    ended("400", "context_length_exceeded")
    ended("429", "rate_limit_exceeded")
    ended("429", "concurrency_limit")
    ended("413")
    ended("200", reasons=["abort"])
    ended("499")
    ended("200", reasons=["stop"])
    for reason in ("too_long", "rate_limit", "concurrency", "body_too_large"):
        assert value(metrics, "admission_rejections_total", reason=reason) == 1, reason
    assert metrics.registry.get_sample_value("quire_client_disconnects_total") == 2


def respond(app, method: str, path: str) -> None:
    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        pass

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "root_path": "",
        "scheme": "http",
        "server": ("test", 80),
    }
    asyncio.run(app(scope, receive, send))


def test_http_requests_are_counted_by_template_method_and_code():
    async def show(request):
        return PlainTextResponse(request.path_params["id"])

    async def fail(request):
        raise RuntimeError("no answer")

    metrics = Metrics()
    app = HTTPMetricsMiddleware(
        Starlette(routes=[Route("/things/{id:path}", show), Route("/fail", fail)]), metrics
    )
    respond(app, "GET", "/things/1")
    respond(app, "GET", "/things/2/3")
    respond(app, "POST", "/things/1")
    respond(app, "BREW", "/nothing/secret")
    with pytest.raises(RuntimeError):
        respond(app, "GET", "/fail")

    counts = {
        tuple(sample.labels[label] for label in ("route", "method", "code")): sample.value
        for family in metrics.http_requests.collect()
        for sample in family.samples
    }
    assert counts == {
        ("/things/{id:path}", "GET", "200"): 2,
        ("/things/{id:path}", "POST", "405"): 1,
        ("unmatched", "OTHER", "404"): 1,
        ("/fail", "GET", "500"): 1,
    }


def test_names_and_units_are_prometheus_style(metrics, worker):
    worker.ready(READY)
    worker.stats = stats()
    text = metrics.render("")[0].decode()
    for family in parse_text(text):
        if not family.name.startswith("quire_"):
            continue
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name)
        assert family.documentation.endswith((".", "0", "1"))
        samples = {sample.name for sample in family.samples}
        if family.type == "counter":
            assert all(name.endswith("_total") for name in samples)
        else:
            assert not any(name.endswith(("_total", "_created")) for name in samples)
        assert not re.search(r"_(ms|us|ns|mb|kb|gb|millis\w*|percent)(_|$)", family.name)
    if promtool := shutil.which("promtool"):
        subprocess.run([promtool, "check", "metrics"], input=text, text=True, check=True)
