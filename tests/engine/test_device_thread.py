"""Steps encoded on one thread and scheduled on another give what one thread would."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar
from unittest import mock

import mlx.core as mx
import pytest
from model_zoo import build

from quire.engine.config import EngineConfig
from quire.engine.device_thread import DeviceThread
from quire.engine.engine import Engine
from quire.engine.messages import GenerateRequest, SamplingParams, TokenOutput
from quire.engine.step.runner import ModelRunner

T = TypeVar("T")


def make_engine(num_blocks: int = 64) -> Engine:
    config = EngineConfig(num_blocks, max_num_seqs=8, max_num_batched_tokens=48, encode_ahead=True)
    return Engine(build("llama"), config)


def traffic(engine: Engine) -> dict[int, list[TokenOutput]]:
    """Requests of all kinds that come and go while others run."""
    draw = random.Random(1)
    outputs: dict[int, list[TokenOutput]] = {}
    waiting = list(range(30))
    while waiting or engine.has_work:
        for _ in range(draw.choice([0, 0, 1, 3])):
            if waiting:
                request_id = waiting.pop()
                outputs[request_id] = []
                prompt = [draw.randrange(100) for _ in range(draw.choice([1, 16, 33, 90]))]
                if request_id % 3:
                    prompt = list(range(40)) + prompt[:20]
                params = SamplingParams(temperature=draw.choice([0.0, 0.8]), seed=request_id)
                engine.submit(GenerateRequest(request_id, prompt, draw.randint(1, 25), params))
        if outputs and draw.random() < 0.1:
            engine.abort(draw.choice(list(outputs)))
        for output in engine.step():
            outputs[output.request_id].append(output)
        engine.scheduler.check()
    return outputs


def tokens_of(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def ends(outputs: list[TokenOutput]) -> bool:
    return bool(outputs) and outputs[-1].finish_reason is not None


def beside(engine: Engine, work: Callable[[Engine], T]) -> T:
    device = DeviceThread()
    engine.encode_on(device)
    return device.run_beside(lambda: work(engine))


@pytest.mark.parametrize("num_blocks", [64, 16])
def test_two_threads_give_what_one_gives(num_blocks: int) -> None:
    alone = make_engine(num_blocks)
    expected = traffic(alone)
    engine = make_engine(num_blocks)
    found = beside(engine, traffic)
    assert found.keys() == expected.keys()
    for request_id, outputs in expected.items():
        tokens, others = tokens_of(outputs), tokens_of(found[request_id])
        # Tokens leave a step later beside the device, which one that is aborted does not wait for.
        short = min(len(tokens), len(others))
        assert tokens[:short] == others[:short]
        if ends(outputs) and ends(found[request_id]):
            assert tokens == others
        else:
            assert abs(len(tokens) - len(others)) <= 1
    assert engine.stats().preemptions == alone.stats().preemptions
    assert num_blocks == 64 or engine.stats().preemptions > 0
    assert sum(map(len, expected.values())) > 100


def test_all_graphs_are_built_and_run_by_the_device_thread() -> None:
    """MLX's streams belong to a thread: what another one built could not be evaluated."""
    engine = make_engine()

    def work(engine: Engine) -> list[int]:
        with mx.stream(mx.new_stream(mx.cpu)):  # nothing of it may end up in a graph
            engine.submit(GenerateRequest(0, [1, 2, 3], 5, SamplingParams(temperature=0)))
            got: list[int] = []
            while engine.has_work:
                got += [token for output in engine.step() for token in output.token_ids]
            return got

    assert len(beside(engine, work)) == 5


def test_a_step_that_cannot_be_built_fails_the_caller() -> None:
    engine = make_engine()

    def work(engine: Engine) -> None:
        engine.submit(GenerateRequest(0, [1, 2, 3], 5, SamplingParams()))
        while engine.has_work:
            engine.step()

    broken = mock.patch.object(ModelRunner, "build", side_effect=RuntimeError("no kernel"))
    with broken, pytest.raises(RuntimeError, match="no kernel"):
        beside(engine, work)
