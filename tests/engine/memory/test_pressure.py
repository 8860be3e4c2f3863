"""A machine that is short of memory gets some back, and no request notices but by the time."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest
from metal_sim import simulated_kernels
from model_zoo import build, reference_generate

from quire.engine.config import EngineConfig
from quire.engine.device_thread import DeviceThread
from quire.engine.engine import Engine
from quire.engine.memory.pressure import Pressure, Relief, system_pressure
from quire.engine.messages import GenerateRequest, SamplingParams, TokenOutput
from quire.engine.model.paged_model import PagedModel
from quire.engine.model.paging import page_model
from quire.engine.step.runner import ModelRunner
from quire.kernels.choice.selection import Selector, selecting


@pytest.mark.parametrize(
    ("available", "cgroup", "expected"),
    [
        (8000, None, Pressure.NONE),
        (700, None, Pressure.SHORT),
        (300, None, Pressure.CRITICAL),
        (8000, (2000, 500), Pressure.NONE),
        (8000, (2000, 1900), Pressure.SHORT),
        (8000, (2000, 1960), Pressure.CRITICAL),
    ],
)
def test_what_is_left_tells(
    available: int, cgroup: tuple[int, int] | None, expected: Pressure, tmp_path: Path
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    meminfo = f"MemTotal: {10000 * 1024} kB\nMemAvailable: {available * 1024} kB\n"
    (tmp_path / "proc/meminfo").write_text(meminfo)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    if cgroup is not None:
        folder = tmp_path / "sys/fs/cgroup"
        folder.mkdir(parents=True)
        for name, size in zip(("memory.max", "memory.current"), cgroup, strict=True):
            (folder / name).write_text(str(size << 20))
    assert system_pressure(tmp_path) is expected


def test_blocks_go_by_halves_and_come_back_when_it_is_calm() -> None:
    level = Pressure.NONE
    relief = Relief(1000, 200, lambda: level)
    assert relief.look(10.0) is Pressure.NONE
    assert relief.look(10.5) is None
    assert relief.num_blocks(Pressure.NONE, 10.0, 1000, idle=True) == 1000
    level = Pressure.CRITICAL
    sizes = [1000]
    for now in range(20, 26):
        found = relief.look(float(now))
        assert found is Pressure.CRITICAL
        sizes.append(relief.num_blocks(found, now, sizes[-1], idle=False))
    assert sizes == [1000, 501, 251, 200, 200, 200, 200]
    level = Pressure.SHORT
    assert relief.look(30.0) is Pressure.SHORT
    assert relief.num_blocks(Pressure.SHORT, 30.0, 200, idle=True) == 200
    level = Pressure.NONE
    relief.look(31.0)
    assert relief.num_blocks(Pressure.NONE, 31.0, 200, idle=True) == 200
    relief.look(91.0)
    assert relief.num_blocks(Pressure.NONE, 91.0, 200, idle=False) == 200
    assert relief.num_blocks(Pressure.NONE, 91.0, 200, idle=True) == 1000
    # Somebody may always be served.
    assert relief.num_blocks(Pressure.NONE, 630.0, 200, idle=False) == 1000


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.long)])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    with ExitStack() as stack:
        if request.param == "gpu":
            on_gpu = mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True)
            stack.enter_context(on_gpu)
            stack.enter_context(simulated_kernels(orders=1))
            stack.enter_context(selecting(Selector("metal", None)))
        yield request.param


def test_blocks_that_find_no_room_return_later() -> None:
    level = Pressure.CRITICAL
    engine = Engine(build("qwen3", 0), EngineConfig(400, block_size=8, least_blocks=12))
    engine._relief = Relief(400, 12, lambda: level)
    engine.relieve(0.0)
    small = engine._pools.blocks.num_blocks
    assert small < 400
    level = Pressure.NONE
    allocate = PagedModel.allocate

    def full(model: PagedModel, num_blocks: int, *sizes: int) -> None:
        if num_blocks == 400:
            raise RuntimeError("[metal::malloc] Unable to allocate 17179869184 bytes.")
        allocate(model, num_blocks, *sizes)

    with mock.patch.object(PagedModel, "allocate", full):
        engine.relieve(100.0)
    assert engine._pools.blocks.num_blocks == small
    engine.relieve(110.0)  # not at once
    assert engine._pools.blocks.num_blocks == small
    engine.submit(GenerateRequest(0, [5, 6, 7], 3, SamplingParams(temperature=0)))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for output in engine.step() for token in output.token_ids]
    assert tokens == reference_generate(build("qwen3", 0), [5, 6, 7], 3)[0]
    engine.relieve(200.0)
    assert engine._pools.blocks.num_blocks == 400


def test_requests_go_on_over_fewer_blocks(place: str) -> None:
    level = Pressure.NONE
    settings: dict[str, Any] = {"num_blocks": 400, "block_size": 8, "max_num_seqs": 4}
    config = EngineConfig(max_num_batched_tokens=40, least_blocks=12, **settings)
    model = page_model(build("qwen3", 0), "qwen3")
    engine = Engine(model, config)
    engine._relief = Relief(400, 12, lambda: level)
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 90) for _ in range(n)] for n in (60, 30, 9)]
    tokens: dict[int, list[int]] = {i: [] for i in range(3)}
    sizes = []

    def serve() -> None:
        nonlocal level
        for i, prompt in enumerate(prompts):
            engine.submit(GenerateRequest(i, prompt, 8, SamplingParams(temperature=0)))
        now = 0.0
        while engine.has_work:
            for output in engine.step():
                assert output.finish_reason != "error"
                tokens[output.request_id] += output.token_ids
            now += 2
            level = Pressure.CRITICAL if 4 <= now <= 14 else Pressure.NONE
            engine.relieve(now)
            engine.scheduler.check()
            sizes.append(engine._pools.blocks.num_blocks)
        mx.synchronize()
        pages = model.page_bytes
        assert pages == sizes[-1] * 8 * model.bytes_per_token
        engine.relieve(now + 100)
        engine.scheduler.check()

    if engine.encodes_ahead:
        device = DeviceThread()
        engine.encode_on(device)
        device.run_beside(serve)
    else:
        serve()
    assert min(sizes) == 12
    assert sizes == sorted(sizes, reverse=True)
    assert engine._pools.blocks.num_blocks == 400
    for i, prompt in enumerate(prompts):
        assert tokens[i] == reference_generate(build("qwen3", 0), prompt, 8)[0]


def test_blocks_go_while_every_step_is_encoded_late() -> None:
    """Then tokens always wait for the next step's encoding when memory is looked at."""
    build_step, collect = ModelRunner.build, ModelRunner.collect
    collected = [threading.Event() for _ in range(200)]

    def build_late(self: ModelRunner, host: Any, previous: Any) -> Any:
        if previous is not None:
            assert collected[previous.batch.step_id].wait(60)
        return build_step(self, host, previous)

    def collect_and_tell(self: ModelRunner, step: Any) -> Any:
        results = collect(self, step)
        collected[step.batch.step_id].set()
        return results

    with (
        mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True),
        simulated_kernels(orders=1),
        selecting(Selector("metal", None)),
        mock.patch.object(ModelRunner, "build", build_late),
        mock.patch.object(ModelRunner, "collect", collect_and_tell),
    ):
        engine = Engine(
            page_model(build("qwen3", 0), "qwen3"),
            EngineConfig(60, block_size=8, least_blocks=10, encode_ahead=True),
        )
        sizes: list[int] = []
        level = lambda: Pressure.CRITICAL if len(sizes) > 4 else Pressure.NONE  # noqa: E731
        engine._relief = Relief(60, 10, level)
        tokens: list[int] = []
        waiting = []

        def serve() -> None:
            engine.submit(GenerateRequest(0, [5, 6, 7], 12, SamplingParams(temperature=0)))
            while engine.has_work:
                take(engine.step(send=take))
                waiting.append(bool(engine._unconfirmed))
                sizes.append(engine._pools.blocks.num_blocks)
                engine.relieve(2.0 * len(sizes))

        def take(outputs: list[TokenOutput]) -> None:
            tokens.extend(token for output in outputs for token in output.token_ids)

        device = DeviceThread()
        engine.encode_on(device)
        device.run_beside(serve)
    assert waiting[4]
    assert sizes[4:6] == [60, 31]
    assert tokens == reference_generate(build("qwen3", 0), [5, 6, 7], 12)[0]
