"""What MLX is told, and what a start and a load leave behind."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import mlx.core as mx
import pytest
from model_zoo import build

from quire.engine.engine import Engine
from quire.engine.memory import limits as limits_module
from quire.engine.memory.budget import Budget
from quire.engine.memory.limits import limit_loading, limit_serving
from quire.engine.messages import GenerateRequest, MemoryLimits, SamplingParams, WorkerConfig
from quire.engine.model.block_weights import read_blocks
from quire.engine.startup.start import start_engine
from quire.loadtest.model_folder import ModelShape, make_model

SHAPE = ModelShape(
    hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, intermediate=128, vocab=300
)


@pytest.fixture(autouse=True)
def own_limits() -> Iterator[None]:
    """MLX's limits are the process's."""
    cache, memory = mx.set_cache_limit(0), mx.set_memory_limit(1 << 40)
    mx.set_cache_limit(cache)
    mx.set_memory_limit(memory)
    yield
    mx.set_cache_limit(cache)
    mx.set_memory_limit(memory)


@pytest.mark.parametrize("gigabytes", [8, 16, 24, 36, 64, 128, 192, 512])
def test_metal_is_told_all_three(gigabytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, int] = {}
    for name in ("set_wired_limit", "set_memory_limit", "set_cache_limit"):
        monkeypatch.setattr(limits_module.mx, name, lambda n, name=name: told.update({name: n}))
    usable = gigabytes << 29
    budget = Budget("metal", usable, None)
    limit_loading(budget)
    assert told["set_wired_limit"] == told["set_memory_limit"] == int(0.85 * usable)
    assert told["set_cache_limit"] <= 1 << 30
    budget = Budget("metal", usable, None, 1 << 30, 100 << 20)
    found = limit_serving(budget, 1 << 30)
    assert told["set_cache_limit"] == found.cache >= found.activations == 100 << 20
    assert told["set_memory_limit"] == found.limit == int(0.85 * usable)
    assert told["set_wired_limit"] == found.wired == (2 << 30) + (100 << 20) + found.cache
    assert found.wired <= found.limit <= usable
    # More than the fraction was asked for by --kv-cache-memory.
    found = limit_serving(budget, usable - (1 << 30) - (100 << 20))
    assert found.wired <= usable
    assert found.limit >= usable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    make_model(path, SHAPE)
    return path


def start(folder: Path, **settings: object) -> tuple[Engine, MemoryLimits, int]:
    """The engine, its limits, and weights and pages together."""
    config = WorkerConfig(str(folder), "", "", device="cpu", **settings)  # type: ignore[arg-type]
    startup = start_engine(config, [], lambda stage, done, total: None)
    ready = startup.ready
    assert ready.limits is not None
    return startup.engine, ready.limits, ready.weight_bytes + ready.kv_cache_bytes


def test_a_start_leaves_no_freed_buffers(folder: Path) -> None:
    before = mx.get_active_memory()
    engine, limits, held = start(folder, max_num_seqs=8)
    assert mx.get_cache_memory() < 1 << 20
    assert mx.get_active_memory() - before < 1.02 * held + (1 << 20)
    assert limits.activations > 0
    assert not engine.has_work


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_a_ragged_load_stays_within_weights_pages_and_a_step(folder: Path, count: int) -> None:
    before = mx.get_active_memory()
    engine, limits, held = start(folder, max_num_seqs=16, kv_cache_memory=4 << 20)
    draw = random.Random(0)
    worst = 0
    for request_id in range(count):
        prompt = [draw.randrange(3, 250) for _ in range(draw.randint(1, 400))]
        sampling = SamplingParams(temperature=draw.choice([0.0, 1.0]))
        engine.submit(GenerateRequest(request_id, prompt, draw.randint(1, 30), sampling))
        while len(engine.scheduler.waiting) > 8:
            engine.step()
            worst = max(worst, mx.get_active_memory() + mx.get_cache_memory() - before)
    while engine.has_work:
        engine.step()
    mx.synchronize()
    left = mx.get_active_memory() + mx.get_cache_memory() - before
    bound = 1.1 * (held + limits.activations)
    assert left <= bound
    # While it runs a step's own buffers come on top.
    assert worst <= bound + limits.activations


def test_joined_weights_replace_the_others() -> None:
    """What a fused block does with its linears leaves one copy of each weight, and no other."""
    model = build("qwen3", 0)
    mx.eval(model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    blocks = read_blocks(model)
    mx.clear_cache()
    small = sum(block.weights.rotary.nbytes for block in blocks)
    assert mx.get_active_memory() - before <= small + 4096


def test_a_step_that_does_not_fit_is_refused_with_what_might(folder: Path) -> None:
    failed = RuntimeError("[malloc] Unable to allocate 17179869184 bytes.")
    with (
        mock.patch("quire.engine.startup.start.measure_activations", side_effect=failed),
        pytest.raises(Exception, match="--max-num-batched-tokens 256 might fit"),
    ):
        start(folder)
