"""The exposition: formats, names, labels that clients cannot invent, totals that only grow."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from quire.engine.messages import MemoryLimits, Ready, StateStats, WorkerStats
from quire.serve.metrics import HTTPMetricsMiddleware, Metrics

READY = Ready("llama", "cpu", "float32", 100, 2048, 4, 16, 50, 1000, 2000)
NAMES = WorkerStats.__struct_fields__


def stats(**values: int) -> WorkerStats:
    return WorkerStats(**{**dict.fromkeys(NAMES, 0), "states": None, **values})


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"quire_{name}", labels)


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


def test_it_answers_while_loading_and_says_so():
    metrics = Metrics()
    assert value(metrics, "model_ready") == 0
    assert value(metrics, "requests_running") == 0
    metrics.worker.ready(READY)
    assert value(metrics, "model_ready") == 1
    assert value(metrics, "kv_blocks", state="free") == 50
    assert value(metrics, "memory_bytes", kind="weights") == 1000


def test_the_limits_of_memory_are_shown():
    metrics = Metrics()
    limits = MemoryLimits(usable=9000, limit=8000, activations=700, cache=600, wired=5000)
    metrics.worker.ready(msgspec.structs.replace(READY, limits=limits))
    kinds = {"limit": 8000, "activations": 700, "cache_limit": 600, "wired_limit": 5000}
    assert {k: value(metrics, "memory_bytes", kind=k) for k in kinds} == kinds
    metrics.worker.lost()
    assert value(metrics, "memory_bytes", kind="limit") is None


def test_the_gauges_mirror_one_snapshot():
    metrics = Metrics()
    metrics.worker.ready(READY)
    numbers = {name: position for position, name in enumerate(NAMES, start=1)}
    slots = {"used": 101, "cached": 102, "free": 103}
    numbers.pop("states")
    metrics.worker.stats = WorkerStats(**numbers, states=StateStats(prefix_pages=104, **slots))
    assert value(metrics, "prefix_cache_page_hit_tokens_total") == 104
    assert {state: value(metrics, "state_slots", state=state) for state in slots} == slots
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
        "evictions": value(metrics, "evictions_total"),
        "prefix_queries": value(metrics, "prefix_cache_query_tokens_total"),
        "prefix_hits": value(metrics, "prefix_cache_hit_tokens_total"),
    }
    assert seen == numbers


def test_a_lost_worker_leaves_no_gauge_behind_and_takes_no_count_away():
    metrics = Metrics()
    metrics.worker.ready(READY)
    metrics.worker.stats = stats(preemptions=5, evictions=7, requests_running=3, requests_waiting=2)
    metrics.worker.lost()
    assert value(metrics, "preemptions_total") == 5
    assert value(metrics, "requests_running") == value(metrics, "requests_waiting") == 0
    assert value(metrics, "kv_blocks", state="used") == 0
    metrics.worker.ready(READY)
    metrics.worker.stats = stats(preemptions=1, evictions=2)
    assert value(metrics, "preemptions_total") == 6
    assert value(metrics, "evictions_total") == 9
    metrics.worker.lost()
    metrics.worker.lost()
    assert value(metrics, "preemptions_total") == 6


def test_the_age_of_the_last_step_counts_only_while_requests_run():
    metrics = Metrics()
    metrics.worker.mark_step(1.0)  # long ago
    assert value(metrics, "last_step_age_seconds") == 0
    metrics.worker.in_flight = lambda: 1
    assert value(metrics, "last_step_age_seconds") > 0


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


def test_names_and_units_are_prometheus_style():
    metrics = Metrics()
    metrics.worker.ready(READY)
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
