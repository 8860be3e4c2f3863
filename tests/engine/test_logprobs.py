"""Log-probabilities are those of mlx-lm's log-softmax, whatever else a request asks for."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from grammar_walk import grammar_tokenizer
from llguidance import LLMatcher
from mlx_lm.models import llama

from quire.engine.config import EngineConfig
from quire.engine.device_thread import DeviceThread
from quire.engine.engine import Engine
from quire.engine.grammar import GrammarCompiler
from quire.engine.messages import GenerateRequest, SamplingParams, TokenLogprobs

CLOSE = 1e-5


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


def make_engine(**options: Any) -> Engine:
    defaults = {"num_blocks": 128, "max_num_seqs": 32, "max_num_batched_tokens": 100}
    return Engine(small_model(), EngineConfig(**{**defaults, **options}))


@cache
def small_model() -> llama.Model:
    """Its logits are small: what floating-point sums differ by stays below the tolerance."""
    mx.random.seed(0)
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=grammar_tokenizer().vocab_size,
        )
    )


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(100) for _ in range(length)]


def run(engine: Engine, *requests: GenerateRequest) -> dict[int, Answer]:
    answers = {request.request_id: Answer() for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for output in engine.step():
            answer = answers[output.request_id]
            answer.token_ids += output.token_ids
            answer.logprobs += output.logprobs
            answer.prompt_logprobs += output.prompt_logprobs
    engine.scheduler.check()
    return answers


def log_softmax(model: Any, token_ids: list[int]) -> np.ndarray:
    """(n, vocab), by mlx-lm's model and the formula of its generate_step."""
    logits = model(mx.array([token_ids]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def check(found: list[TokenLogprobs], token_ids: list[int], rows: np.ndarray, top: int) -> None:
    assert len(found) == len(token_ids) == len(rows)
    for entry, token, row in zip(found, token_ids, rows, strict=True):
        assert entry.logprob == pytest.approx(row[token], abs=CLOSE)
        assert len(entry.top_ids) == len(entry.top_logprobs) == top
        assert len(set(entry.top_ids)) == top
        assert entry.top_logprobs == pytest.approx(np.sort(row)[::-1][:top], abs=CLOSE)
        assert entry.top_logprobs == pytest.approx(row[entry.top_ids], abs=CLOSE)


def check_answer(request: GenerateRequest, answer: Answer, model: Any) -> None:
    ids = request.prompt_token_ids
    rows = log_softmax(model, ids + answer.token_ids)
    if request.logprobs is not None:
        check(answer.logprobs, answer.token_ids, rows[len(ids) - 1 : -1], request.logprobs)
    else:
        assert not answer.logprobs
    if request.prompt_logprobs is not None:
        check(answer.prompt_logprobs, ids[1:], rows[: len(ids) - 1], request.prompt_logprobs)
    else:
        assert not answer.prompt_logprobs


def mixed_requests() -> list[GenerateRequest]:
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.3, top_p=0.8, seed=1),
        SamplingParams(temperature=0.7, seed=2, presence_penalty=1, logit_bias={5: 3.0}),
        SamplingParams(seed=3, allowed_token_ids=[1, 2, 3, 50], bad_words=[[1, 2]]),
    ]
    draw = random.Random(5)
    return [
        GenerateRequest(
            i,
            prompt(draw.choice([1, 2, 9, 40, 130]), seed=i),
            draw.randint(1, 20),
            kinds[i % len(kinds)],
            logprobs=draw.choice([None, 0, 1, 5, 20]),
            prompt_logprobs=draw.choice([None, None, 0, 3, 20]),
        )
        for i in range(32)
    ]


@pytest.mark.parametrize("encode_ahead", [False, True])
def test_a_batch_of_many_kinds(encode_ahead: bool) -> None:
    requests, model = mixed_requests(), small_model()
    answers = run(make_engine(encode_ahead=encode_ahead), *requests)
    for request in requests:
        check_answer(request, answers[request.request_id], model)
    tokens = {i: answer.token_ids for i, answer in answers.items()}
    for request in requests[:8]:
        alone = run(make_engine(), request)[request.request_id]
        assert alone.token_ids == tokens[request.request_id]


def test_what_is_reported_changes_nobodys_tokens() -> None:
    requests = mixed_requests()
    silent = [
        GenerateRequest(r.request_id, r.prompt_token_ids, r.max_tokens, r.sampling)
        for r in requests
    ]
    expected = {i: answer.token_ids for i, answer in run(make_engine(), *silent).items()}
    answers = run(make_engine(), *requests)
    assert {i: answer.token_ids for i, answer in answers.items()} == expected


def test_on_two_threads() -> None:
    device = DeviceThread()
    engine = make_engine(encode_ahead=True)
    engine.encode_on(device)
    requests = mixed_requests()
    answers = device.run_beside(lambda: run(engine, *requests))
    for request in requests:
        check_answer(request, answers[request.request_id], small_model())


def test_where_sequences_are_preempted() -> None:
    requests = [
        GenerateRequest(
            i, prompt(90, i), 30, SamplingParams(seed=i), logprobs=2, prompt_logprobs=i % 2
        )
        for i in range(6)
    ]
    engine = make_engine(num_blocks=22)
    answers = run(engine, *requests)
    assert engine.stats().preemptions > 0
    for request in requests:
        check_answer(request, answers[request.request_id], small_model())


def test_a_cached_prefix_is_scored_all_the_same() -> None:
    engine, ids = make_engine(), prompt(100)
    greedy = SamplingParams(temperature=0)
    run(engine, GenerateRequest(0, ids, 4, greedy))
    scored = GenerateRequest(1, ids, 4, greedy, prompt_logprobs=2)
    check_answer(scored, run(engine, scored)[1], small_model())
    # And a request that scores nothing still finds it.
    engine.submit(GenerateRequest(2, ids, 4, greedy))
    while not (outputs := engine.step()):
        pass
    assert outputs[0].num_cached_tokens == 96


def test_a_step_scores_few_prompt_tokens() -> None:
    """Each takes logits over the whole vocabulary."""
    engine = make_engine(max_num_batched_tokens=400)
    for i in range(3):
        engine.submit(GenerateRequest(i, prompt(200, i), 2, SamplingParams(), prompt_logprobs=0))
    most = 0
    schedule = engine.scheduler.schedule

    def noted() -> Any:
        nonlocal most
        batch = schedule()
        most = max(most, batch.num_scored if batch else 0)
        return batch

    engine.scheduler.schedule = noted  # type: ignore[method-assign]
    while engine.has_work:
        engine.step()
    assert 0 < most <= 64


def test_a_grammar_leaves_them_as_the_model_gave_them() -> None:
    model = small_model()
    grammars = GrammarCompiler(grammar_tokenizer(), threads=1)
    engine = Engine(model, EngineConfig(num_blocks=64, max_num_batched_tokens=100), None, grammars)
    request = GenerateRequest(
        0,
        prompt(9),
        12,
        SamplingParams(seed=1),
        grammar=LLMatcher.grammar_from_regex("[ab]{8}"),
        logprobs=4,
    )
    answer = run(engine, request)[0]
    check_answer(request, answer, model)
    assert all(entry.logprob < math.log(0.5) for entry in answer.logprobs)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_logits_of_half_precision_are_summed_in_full(dtype: mx.Dtype) -> None:
    model = small_model.__wrapped__()
    model.apply(lambda array: array.astype(dtype))
    engine = Engine(model, EngineConfig(num_blocks=64, max_num_batched_tokens=100))
    request = GenerateRequest(0, prompt(20), 1, SamplingParams(temperature=0), logprobs=20)
    [entry] = run(engine, request)[0].logprobs
    total = sum(math.exp(x) for x in entry.top_logprobs)
    everything = log_softmax(model, request.prompt_token_ids)[-1]
    assert total == pytest.approx(np.exp(np.sort(everything)[::-1][:20]).sum(), rel=0.03)
