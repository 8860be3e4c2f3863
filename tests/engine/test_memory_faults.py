"""A device without memory for a step: nothing is lost that could be computed, nothing is wrong."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
from metal_sim import simulated_kernels
from model_zoo import build, reference_generate

from quire.engine.config import EngineConfig
from quire.engine.device_thread import DeviceThread
from quire.engine.engine import Engine
from quire.engine.memory.faults import MemoryFaults
from quire.engine.messages import GenerateRequest, SamplingParams, TokenOutput
from quire.engine.model.paging import page_model
from quire.engine.step.runner import ModelRunner
from quire.kernels.choice.selection import Selector, selecting

GREEDY = SamplingParams(temperature=0)
METAL = "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU...)"
SETTINGS: dict[str, Any] = {"num_blocks": 60, "block_size": 8, "max_num_seqs": 4}
PROMPTS = [[random.Random(n).randrange(3, 90) for _ in range(n)] for n in (60, 5, 31, 1)]


@pytest.fixture(params=["cpu", "one thread", "two threads"])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    with ExitStack() as stack:
        if request.param != "cpu":
            on_gpu = mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True)
            stack.enter_context(on_gpu)
            stack.enter_context(simulated_kernels(orders=1))
            stack.enter_context(selecting(Selector("metal", None)))
        yield request.param


def serve(engine: Engine, place: str, max_tokens: int = 6) -> dict[int, list[TokenOutput]]:
    """All prompts at once; the outputs of each."""
    outputs: dict[int, list[TokenOutput]] = {i: [] for i in range(len(PROMPTS))}

    def take(found: list[TokenOutput]) -> None:
        for output in found:
            outputs[output.request_id].append(output)

    def run() -> None:
        for i, prompt in enumerate(PROMPTS):
            engine.submit(GenerateRequest(i, prompt, max_tokens, GREEDY))
        while engine.has_work:
            take(engine.step(send=take))
            engine.scheduler.check()

    if place == "two threads":
        device = DeviceThread()
        engine.encode_on(device)
        device.run_beside(run)
    else:
        run()
    return outputs


def make_engine(**settings: Any) -> Engine:
    model = page_model(build("qwen3", 0), "qwen3")
    return Engine(model, EngineConfig(max_num_batched_tokens=130, **{**SETTINGS, **settings}))


def failing(method: str, calls: set[int], text: str = METAL) -> Any:
    """``ModelRunner.method`` that raises at its so many'th calls."""
    run, count = getattr(ModelRunner, method), 0

    def called(self: ModelRunner, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count in calls:
            raise RuntimeError(text)
        return run(self, *args)

    return mock.patch.object(ModelRunner, method, called)


@pytest.mark.parametrize("method", ["build", "collect"])
@pytest.mark.parametrize("calls", [{2}, {3, 4, 5}])
def test_every_request_ends_as_if_nothing_had_happened(
    method: str, calls: set[int], place: str
) -> None:
    engine = make_engine()
    with failing(method, calls):
        outputs = serve(engine, place)
    for i, prompt in enumerate(PROMPTS):
        tokens = [token for output in outputs[i] for token in output.token_ids]
        expected = reference_generate(build("qwen3", 0), prompt, 6)[0]
        reason = outputs[i][-1].finish_reason
        # With two threads the step before the one that could not be built is not trusted.
        assert reason == "length" or (place == "two threads" and method != "collect")
        assert tokens == expected if reason == "length" else tokens == expected[: len(tokens)]
        assert sum(output.finish_reason is not None for output in outputs[i]) == 1
    assert engine.stats().memory_faults == len(calls)
    assert engine.stats().blocks_used == 0
    # The first fault costs only MLX's freed buffers; prompts are cut from the next one on.
    if len(calls) == 1:
        assert engine.scheduler.limits.prompt_tokens == 130


def test_what_never_fits_ends_with_an_error_and_others_go_on(place: str) -> None:
    engine = make_engine()
    build_step = ModelRunner.build

    def too_long(self: ModelRunner, host: Any, previous: Any) -> Any:
        if any(chunk.sequence.request.request_id == 0 for chunk in host.batch.chunks):
            raise RuntimeError(METAL)
        return build_step(self, host, previous)

    with mock.patch.object(ModelRunner, "build", too_long):
        outputs = serve(engine, place)
        assert outputs[0][-1].finish_reason == "error"
        assert "no memory" in (outputs[0][-1].error or "")
        assert "Insufficient Memory" in (outputs[0][-1].error or "")
        assert engine.scheduler.limits.prompt_tokens == 32
    assert engine.stats().blocks_used == 0
    # Whoever shared its step may have ended too, but has got no wrong token.
    for i, prompt in enumerate(PROMPTS):
        tokens = [token for output in outputs[i] for token in output.token_ids]
        assert tokens == reference_generate(build("qwen3", 0), prompt, 6)[0][: len(tokens)]
        assert sum(output.finish_reason is not None for output in outputs[i]) == 1


def test_other_failures_are_not_hidden(place: str) -> None:
    text = "[METAL] Command buffer execution failed: Page fault"
    with failing("collect", {2}, text), pytest.raises(RuntimeError, match="Page fault"):
        serve(make_engine(), place)


def test_no_token_of_a_failed_step_leaves() -> None:
    """Who encodes the next step is told of the error, and who waits for this one is not."""
    engine = make_engine(encode_ahead=True)
    collected, told = threading.Event(), threading.Event()
    collect, build_step = ModelRunner.collect, ModelRunner.build
    garbage = 77

    def collect_garbage(self: ModelRunner, step: Any) -> Any:
        results = collect(self, step)
        if step.batch.step_id != 3:
            return results
        collected.set()
        return results._replace(tokens=[garbage for _ in results.tokens])

    def build_or_fail(self: ModelRunner, host: Any, previous: Any) -> Any:
        step = build_step(self, host, previous)
        if host.batch.step_id == 4:
            # Late: the tokens have been read by then.
            assert collected.wait(60)
            told.set()
            raise RuntimeError(METAL)
        return step

    with (
        mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True),
        simulated_kernels(orders=1),
        selecting(Selector("metal", None)),
        mock.patch.object(ModelRunner, "collect", collect_garbage),
        mock.patch.object(ModelRunner, "build", build_or_fail),
    ):
        outputs = serve(engine, "two threads")
    assert told.is_set()
    for i, prompt in enumerate(PROMPTS):
        tokens = [token for output in outputs[i] for token in output.token_ids]
        expected = reference_generate(build("qwen3", 0), prompt, 6)[0]
        assert tokens == expected[: len(tokens)]
        ended = outputs[i][-1].finish_reason
        assert ended == ("length" if tokens == expected else "error")
    assert any(outputs[i][-1].finish_reason == "error" for i in outputs)


def test_faults_shrink_and_are_forgotten() -> None:
    faults = MemoryFaults(128)
    assert faults.failed(has_prompts=True)
    assert faults.prompt_tokens == 128
    assert faults.failed(has_prompts=True)
    assert faults.prompt_tokens == 64
    assert not faults.failed(has_prompts=False)
    assert faults.failed(has_prompts=True)
    assert faults.prompt_tokens == 32
    assert not faults.failed(has_prompts=True)
    assert [n for n in range(3001) if faults.succeeded()] == [999, 1999]
    assert faults.prompt_tokens == 128
    assert faults.failed(has_prompts=True)
    assert faults.prompt_tokens == 128
    assert faults.count == 6


def served(faults: MemoryFaults, prompt: int, fits: int) -> bool:
    """Whether a prompt is ever done on a device with room for so many rows times context."""
    done = 0
    while done < prompt:
        tokens = min(faults.prompt_tokens, prompt - done)
        if tokens * (done + tokens) <= fits:
            faults.succeeded()
            done += tokens
        elif faults.failed(has_prompts=True):
            done = 0
        else:
            return False
        if faults.count == 60:
            return False
    return True


@pytest.mark.parametrize(("prompt", "step", "rows"), [(200_000, 2048, 48), (60_000, 512, 40)])
def test_a_prompt_that_fits_in_small_steps_is_not_tried_for_ever(
    prompt: int, step: int, rows: int
) -> None:
    assert served(MemoryFaults(step), prompt, rows * prompt)
    assert not served(MemoryFaults(step), prompt, 20 * prompt)
