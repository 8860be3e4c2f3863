"""A prompt's vector is that of mlx-lm's own hidden states, whatever runs beside it."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from metal_sim import simulated_kernels
from model_zoo import build

from quire.engine.config import EngineConfig
from quire.engine.device_thread import DeviceThread
from quire.engine.engine import Engine
from quire.engine.messages import GenerateRequest, Pooling, SamplingParams, TokenOutput
from quire.engine.step.runner import ModelRunner, Results, Step
from quire.kernels.choice.selection import Selector, selecting

ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "mixtral", "cohere2", "olmo2"]
CLOSE = 2e-5  # of vectors of length 1
SAMPLED = SamplingParams(temperature=0.8, seed=3)


def reference(model: Any, request: GenerateRequest) -> np.ndarray:
    """By mlx-lm's own forward pass without a cache: hidden states behind the final norm."""
    assert request.pooling is not None
    inner = getattr(model, "backbone", None) or model.model
    hidden = np.array(inner(mx.array([request.prompt_token_ids]))[0].astype(mx.float32))
    vector = hidden[-1] if request.pooling.kind == "last" else hidden.mean(axis=0)
    vector = vector[: request.pooling.dimensions]
    return vector / np.linalg.norm(vector)


def prompt(length: int, seed: int = 0, vocab: int = 64) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(vocab) for _ in range(length)]


def pooled(
    request_id: int, ids: list[int], kind: Any = "last", dimensions: int | None = None
) -> GenerateRequest:
    return GenerateRequest(request_id, ids, 0, SAMPLED, pooling=Pooling(kind, dimensions))


def generating(request_id: int, ids: list[int], max_tokens: int = 12) -> GenerateRequest:
    return GenerateRequest(request_id, ids, max_tokens, SAMPLED, logprobs=request_id % 3 or None)


def make_engine(model: Any, **options: Any) -> Engine:
    defaults = {"num_blocks": 128, "max_num_seqs": 32, "max_num_batched_tokens": 50}
    return Engine(model, EngineConfig(**{**defaults, **options}), "model")


def run(engine: Engine, *requests: GenerateRequest) -> dict[int, list[TokenOutput]]:
    answers: dict[int, list[TokenOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for output in engine.step():
            answers[output.request_id].append(output)
        engine.scheduler.check()
    assert engine.stats().blocks_used == 0
    return answers


def vector_of(outputs: list[TokenOutput]) -> np.ndarray:
    [output] = outputs
    assert output.finish_reason == "stop", output.error
    assert output.token_ids == []
    return np.frombuffer(output.vector, "<f4")


def tokens_of(outputs: list[TokenOutput]) -> list[int]:
    assert not any(output.vector for output in outputs)
    return [token for output in outputs for token in output.token_ids]


def mixed_requests() -> list[GenerateRequest]:
    """Vectors of both kinds beside streams; prompts of one token, of a block, over many steps."""
    draw = random.Random(7)
    requests = []
    for i in range(24):
        ids = prompt(draw.choice([1, 2, 16, 17, 45, 120]), seed=i % 9)
        if i % 3 == 0:
            requests.append(generating(i, ids))
        else:
            dimensions = draw.choice([None, None, 1, 7])
            requests.append(pooled(i, ids, draw.choice(["last", "mean"]), dimensions))
    return requests


def check(model: Any, requests: list[GenerateRequest], answers: dict[int, Any]) -> None:
    for request in requests:
        if request.pooling is not None:
            found = vector_of(answers[request.request_id])
            np.testing.assert_allclose(found, reference(model, request), atol=CLOSE)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_vectors_are_those_of_mlx_lm(name: str) -> None:
    model = build(name)
    engine = make_engine(model)
    assert engine.model.hidden_size > 0
    requests = mixed_requests()
    check(model, requests, run(engine, *requests))


@pytest.mark.parametrize("encode_ahead", [False, True])
def test_a_batch_changes_neither_vectors_nor_streams(encode_ahead: bool) -> None:
    model = build("llama")
    requests = mixed_requests()
    answers = run(make_engine(model, encode_ahead=encode_ahead), *requests)
    for request in requests:
        alone = run(make_engine(model), request)[request.request_id]
        if request.pooling is None:
            assert tokens_of(alone) == tokens_of(answers[request.request_id])
        else:
            np.testing.assert_allclose(
                vector_of(alone), vector_of(answers[request.request_id]), atol=CLOSE
            )


@pytest.mark.parametrize("family", ["qwen3", pytest.param("gemma3_text", marks=pytest.mark.long)])
def test_over_pages_that_kernels_write(family: str) -> None:
    """The GPU's paths, its kernels simulated: the standard block's own forward and mlx-lm's."""
    requests = mixed_requests()[::2]
    with (
        mock.patch("quire.engine.model.paged_model.on_gpu", return_value=True),
        simulated_kernels(orders=1),
        selecting(Selector("metal", None)),
    ):
        engine = make_engine(build(family))
        assert engine.model.is_standard == (family == "qwen3")
        device = DeviceThread()
        engine.encode_on(device)
        answers = device.run_beside(lambda: run(engine, *requests))
    check(build(family), requests, answers)


def test_a_device_without_memory_for_a_step() -> None:
    model, collect, calls = build("llama"), ModelRunner.collect, 0

    def failing(runner: ModelRunner, step: Step) -> Results:
        nonlocal calls
        calls += 1
        if calls in (3, 6):
            raise RuntimeError("[METAL] Insufficient Memory")
        return collect(runner, step)

    requests = mixed_requests()
    engine = make_engine(model)
    with mock.patch.object(ModelRunner, "collect", failing):
        answers = run(engine, *requests)
    assert engine.stats().memory_faults == 2
    check(model, requests, answers)


def test_where_sequences_are_preempted() -> None:
    model = build("llama")
    # Streams that grow take the blocks of long prompts that are under way.
    requests = [generating(i, prompt(20, i), 60) for i in range(4)]
    requests += [pooled(4 + i, prompt(150, 4 + i), ("mean", "last")[i % 2]) for i in range(6)]
    engine = make_engine(model, num_blocks=22, max_num_seqs=8, max_num_batched_tokens=14)
    answers = run(engine, *requests)
    assert engine.stats().preemptions > 0
    check(model, requests, answers)


@pytest.mark.parametrize("name", ["qwen3_next", "nemotron_h"])
def test_of_models_with_recurrent_layers(name: str) -> None:
    model = build(name)
    requests = mixed_requests()
    check(model, requests, run(make_engine(model, num_state_slots=80), *requests))


def test_the_last_state_takes_a_cached_prefix_and_the_mean_computes_it_again() -> None:
    model, ids = build("llama"), prompt(100)
    engine = make_engine(model)
    run(engine, generating(0, ids))
    for number, (kind, cached) in enumerate([("last", 96), ("mean", 0), ("last", 96)], start=1):
        request = pooled(number, ids, kind)
        answers = run(engine, request)
        check(model, [request], answers)
        assert answers[number][0].num_cached_tokens == cached


def test_a_vector_may_fill_the_whole_cache() -> None:
    model = build("llama")
    request = pooled(0, prompt(7 * 16), "mean")
    check(model, [request], run(make_engine(model, num_blocks=8), request))


def test_an_abort_gives_the_blocks_back() -> None:
    engine = make_engine(build("llama"))
    engine.submit(pooled(0, prompt(400), "mean"))
    engine.step()
    engine.step()
    engine.abort(0)
    while engine.has_work:
        assert engine.step() == []
    engine.scheduler.check()
    assert engine.stats().blocks_used == 0


def test_a_state_that_is_not_finite_fails_its_own_request_only() -> None:
    model = build("llama")
    bad = 63
    model.model.embed_tokens.weight[bad] = float("nan")
    good = [pooled(1, prompt(30, 1, bad), "mean"), pooled(2, prompt(5, 2, bad))]
    answers = run(make_engine(model), pooled(0, [1, bad, 2], "mean"), *good)
    [failed] = answers[0]
    assert failed.finish_reason == "error"
    assert "not finite" in (failed.error or "")
    check(model, good, answers)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt"):
        make_engine(build("llama")).submit(pooled(0, []))
