"""Steps are timed as a worker runs them (`quire.loadtest.engine_steps`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from metal_sim import simulated_kernels
from model_zoo import build

from quire.engine.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.model.paging import page_model
from quire.engine.startup.start import Startup
from quire.engine.step.runner import ModelRunner
from quire.loadtest import engine_steps
from quire.loadtest.cuda_kernels import Ran
from quire.loadtest.engine_steps import EngineSteps, Plan


def test_steps_are_encoded_on_another_thread_where_a_worker_does_so() -> None:
    threads: dict[str, set[int]] = {"prepare": set(), "build": set()}

    def noting(name: str) -> Any:
        method = getattr(ModelRunner, name)

        def noted(*args: Any) -> Any:
            threads[name].add(threading.get_ident())
            return method(*args)

        return mock.patch.object(ModelRunner, name, noted)

    plan = Plan(decode=[(2, 8)], mixed=[(2, 8, 8)], prompts=[[16]], steps=2, prompt_runs=1)
    with (
        mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True),
        mock.patch.object(engine_steps, "MAX_TOKEN", 50),
        simulated_kernels(orders=1),
        noting("prepare"),
        noting("build"),
    ):
        model = page_model(build("qwen3", 0), "qwen3")
        engine = Engine(model, EngineConfig(60, 8, max_num_seqs=4, max_num_batched_tokens=32))
        steps = EngineSteps(mock.Mock(Startup, engine=engine), plan)
        for _ in range(2):
            times, _ = steps.measure()
            assert {name: len(each) for name, each in times.items()} == {
                "decode 2x8": 2,
                "mixed 2x8+8": 2,
                "prompts 16": 1,
            }
    assert threads["build"] == {threading.get_ident()}
    assert threading.get_ident() not in threads["prepare"]


def test_kernels_are_recorded_when_all_has_been_timed() -> None:
    plan = Plan(decode=[(1, 8), (2, 8)], prompts=[[16]], steps=2, prompt_runs=1)
    timed: list[int] = []
    time_calls = engine_steps.time_calls

    def counted(step: Callable[[], object], count: int) -> list[float]:
        timed.append(count)
        return time_calls(step, count)

    class Records:
        def __init__(self) -> None:
            assert timed == [2, 2, 1]

        @contextmanager
        def recording(self) -> Iterator[Callable[[], list[Ran]]]:
            yield lambda: [Ran("k", 1000)]

    model = page_model(build("qwen3", 0), "qwen3")
    engine = Engine(model, EngineConfig(60, 8, max_num_seqs=4, max_num_batched_tokens=32))
    startup = mock.Mock(Startup, engine=engine)
    with (
        mock.patch.object(engine_steps, "MAX_TOKEN", 50),
        mock.patch.object(engine_steps, "time_calls", counted),
    ):
        steps = EngineSteps(startup, plan, Records)  # type: ignore[arg-type]
        steps.measure()
    assert [*steps.kernels] == ["decode 1x8", "decode 2x8", "prompts 16"]
    assert all(found[0].name == "k" for found in steps.kernels.values())
