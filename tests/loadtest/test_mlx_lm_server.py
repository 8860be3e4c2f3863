"""The made model and the client against a server that exists: mlx_lm.server, as compared with."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from quire.loadtest.compare import compare, equal_prompts, identical_answers
from quire.loadtest.model_folder import ModelShape, make_model
from quire.loadtest.results import LoadResult
from quire.loadtest.serve import LoadOptions
from quire.loadtest.servers import mlx_lm_spec, quire_spec
from quire.loadtest.workloads import WorkloadSpec


def test_a_made_model_is_served_and_measured(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    shape = ModelShape(
        hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=64, vocab=300
    )
    make_model(tmp_path / "model", shape)
    load = LoadOptions(
        WorkloadSpec(name="shared", requests=6, max_tokens=8, system_chars=300), clients=2
    )
    result = asyncio.run(compare([mlx_lm_spec(tmp_path / "model", 2)], [load], 1, load))
    (run,) = result.runs
    assert run.failure is None
    assert isinstance(run.result, LoadResult)
    summary = run.result.summary
    assert summary.errors == {}
    assert summary.tokens_counted_from == "usage"
    assert summary.output_tokens == 6 * 8  # greedy answers of a made model never end early
    assert summary.prompt_tokens is not None
    assert summary.prompt_tokens > 6 * (300 + 64)  # one token per character, and the template
    assert summary.cached_prompt_tokens
    assert all(len(record.chunk_ms) == 8 for record in run.result.records)


def test_a_model_that_can_think_is_asked_the_same_as_quire() -> None:
    pytest.importorskip("mlx_lm")
    demo = Path(__file__).parents[2] / "engine" / "demo" / "quire-demo"
    load = LoadOptions(WorkloadSpec(requests=3, max_tokens=8, prompt_chars=50), clients=1)
    specs = [quire_spec(demo, 1), mlx_lm_spec(demo, 1)]
    result = asyncio.run(compare(specs, [load], 1, load))
    assert [run.failure for run in result.runs] == [None, None]
    assert equal_prompts(result, "uniform") == (3, 3)
    assert identical_answers(result, "uniform") == (3, 3)
