"""What has been drawn weighs on what is drawn next: as in mlx-lm's loop, in any company."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from model_zoo import build

from quire.engine.config import EngineConfig
from quire.engine.device_thread import DeviceThread
from quire.engine.engine import Engine
from quire.engine.messages import GenerateRequest, SamplingParams

LENGTH = 40
GREEDY = SamplingParams(temperature=0)


def make_engine(**options: Any) -> Engine:
    defaults = {"num_blocks": 128, "max_num_seqs": 32, "max_num_batched_tokens": 64}
    return Engine(build("llama"), EngineConfig(**{**defaults, **options}))


def prompt(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(100) for _ in range(length)]


def run(engine: Engine, *requests: GenerateRequest) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    engine.scheduler.check()
    return tokens


_references: dict[tuple[str, ...], list[int]] = {}


def reference(ids: list[int], params: SamplingParams, late: int = 0) -> list[int]:
    """What :func:`_generate` finds, once for all tests that ask."""
    key = repr(ids), repr(params), repr(late)
    if key not in _references:
        _references[key] = _generate(ids, params, late)
    return _references[key]


def _generate(ids: list[int], params: SamplingParams, late: int) -> list[int]:
    """Greedy, by mlx-lm's loop, with the penalties as they are defined, token by token.

    ``late`` leaves out so many of the newest tokens.
    """

    def penalties(tokens: mx.array, logits: mx.array) -> mx.array:
        found: list[float] = logits[0].tolist()
        outputs: list[int] = tokens.tolist()[len(ids) :]  # type: ignore[index,assignment]
        drawn = Counter(outputs[: len(outputs) - late])
        for token, bias in params.logit_bias.items():
            found[token] += bias
        for token in {*ids, *drawn} if params.repetition_penalty != 1 else ():
            r = params.repetition_penalty
            found[token] = found[token] / r if found[token] > 0 else found[token] * r
        for token, count in drawn.items():
            found[token] -= params.presence_penalty + params.frequency_penalty * count
        if params.allowed_token_ids:
            allowed = set(params.allowed_token_ids)
            found = [x if token in allowed else -math.inf for token, x in enumerate(found)]
        for *head, end in params.bad_words:
            if outputs[len(outputs) - late - len(head) : len(outputs) - late] == head:
                found[end] = -math.inf
        return mx.array([found])

    steps = generate_step(
        mx.array(ids), build("llama"), max_tokens=LENGTH, logits_processors=[penalties]
    )
    return [int(token) for token, _ in steps]


PENALTIES = [
    SamplingParams(temperature=0, presence_penalty=1.5),
    SamplingParams(temperature=0, presence_penalty=-2),
    SamplingParams(temperature=0, presence_penalty=0.25),
    SamplingParams(temperature=0, frequency_penalty=0.8),
    SamplingParams(temperature=0, frequency_penalty=-1.1, presence_penalty=0.5),
    SamplingParams(temperature=0, repetition_penalty=1.3),
    SamplingParams(temperature=0, repetition_penalty=0.8, frequency_penalty=1.7),
    SamplingParams(
        temperature=0,
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=1.3,
        logit_bias={13: 2.5, 40: -1.5},
    ),
]
PLAIN = [GREEDY, SamplingParams(temperature=0.9, top_p=0.9, seed=3)]
RESTRICTIONS = [
    SamplingParams(temperature=0, logit_bias={13: 4.0, 40: -100.0, 90: 3.0}),
    SamplingParams(temperature=0, allowed_token_ids=[3, 5, 13, 40, 99, 123]),
    SamplingParams(temperature=0, allowed_token_ids=list(range(0, 128, 2)), logit_bias={4: 3.0}),
    SamplingParams(temperature=0, bad_words=[[13], [40, 123], [90, 135, 13], [5, 5]]),
]


@pytest.mark.parametrize("params", PENALTIES, ids=repr)
@pytest.mark.parametrize("encode_ahead", [False, True])
def test_tokens_are_those_of_mlx_lm(params: SamplingParams, encode_ahead: bool) -> None:
    prompts = [prompt(23, seed) for seed in (16, 20, 4, 30)]  # whose answers repeat themselves
    expected = [reference(ids, params) for ids in prompts]
    assert expected != [reference(ids, GREEDY) for ids in prompts], "penalties make no difference"
    late = [reference(ids, params, late=1) for ids in prompts]
    assert expected != late, "the newest token makes no difference"
    requests = [GenerateRequest(i, ids, LENGTH, params) for i, ids in enumerate(prompts)]
    assert [*run(make_engine(encode_ahead=encode_ahead), *requests).values()] == expected


@pytest.mark.parametrize("params", RESTRICTIONS, ids=repr)
def test_bias_and_restrictions_are_as_defined(params: SamplingParams) -> None:
    prompts = [prompt(23, seed) for seed in (16, 20, 4, 30)]
    expected = [reference(ids, params) for ids in prompts]
    assert expected != [reference(ids, GREEDY) for ids in prompts], "it makes no difference"
    requests = [GenerateRequest(i, ids, LENGTH, params) for i, ids in enumerate(prompts)]
    assert [*run(make_engine(), *requests).values()] == expected


def test_the_end_of_a_bad_word_is_banned_though_the_token_before_is_not_known_yet() -> None:
    [free] = run(make_engine(), GenerateRequest(0, prompt(23, 16), LENGTH, GREEDY)).values()
    pairs = [[free[i], free[i + 1]] for i in (5, 9)]
    params = SamplingParams(temperature=0, bad_words=[*pairs, free[20:23]])
    for ahead in (False, True):
        request = GenerateRequest(0, prompt(23, 16), LENGTH, params)
        [tokens] = run(make_engine(encode_ahead=ahead), request).values()
        assert tokens[:6] == free[:6]
        assert tokens == reference(prompt(23, 16), params)
        assert all(list(pair) not in pairs for pair in itertools.pairwise(tokens))


@pytest.mark.parametrize(
    ("allowed", "words", "stops"),
    [
        ([5], [[5, 5]], []),  # which depends on a token that is not known yet
        ([5], [[5]], []),
        ([5, 9], [[5]], [9]),
        ([5, 9], [[5, 5], [5, 9], [9]], []),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bans_give_way_where_nothing_would_be_left(
    allowed: list[int], words: list[list[int]], stops: list[int], temperature: float
) -> None:
    params = SamplingParams(temperature, seed=1, allowed_token_ids=allowed, bad_words=words)
    request = GenerateRequest(0, prompt(9), 8, params, min_tokens=8, stop_token_ids=stops)
    for ahead in (False, True):
        [tokens] = run(make_engine(encode_ahead=ahead), request).values()
        assert len(tokens) == 8
        assert set(tokens) <= set(allowed)


def crowd() -> list[GenerateRequest]:
    """32 requests of every kind: with penalties and without, greedy and not."""
    kinds = [
        *PENALTIES,
        *RESTRICTIONS,
        *PLAIN,
        SamplingParams(temperature=1.3, seed=4, presence_penalty=0.7),
        SamplingParams(temperature=0.8, top_k=20, seed=5, presence_penalty=-1),
        SamplingParams(temperature=0.9, seed=6, repetition_penalty=1.2, bad_words=[[1, 2], [3]]),
        SamplingParams(temperature=1.1, top_p=0.8, seed=7, allowed_token_ids=list(range(50))),
    ]
    return [
        GenerateRequest(i, prompt(3 + i % 30, seed=i), 20 + i % 20, kinds[i % len(kinds)])
        for i in range(32)
    ]


def test_a_batch_of_many_kinds_draws_what_each_draws_alone() -> None:
    together = run(make_engine(), *crowd())
    for request in crowd():
        assert run(make_engine(), request)[request.request_id] == together[request.request_id]


def test_the_same_where_sequences_are_preempted() -> None:
    requests = crowd()[:12]
    tight = make_engine(num_blocks=14)
    assert run(tight, *requests) == run(make_engine(), *requests)
    assert tight.stats().preemptions > 0


def test_the_same_on_two_threads() -> None:
    device = DeviceThread()
    engine = make_engine(encode_ahead=True)
    engine.encode_on(device)
    assert device.run_beside(lambda: run(engine, *crowd())) == run(make_engine(), *crowd())


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_rows_without_penalties_are_not_rounded_otherwise(dtype: mx.Dtype) -> None:
    def engine() -> Engine:
        model = build("llama")
        model.apply(lambda array: array.astype(dtype))
        return Engine(model, EngineConfig(num_blocks=128, max_num_batched_tokens=512))

    plain = [r for r in crowd() if r.sampling in PLAIN]
    with_others = run(engine(), *plain, *(r for r in crowd() if r.sampling not in PLAIN))
    # Beside as many rows: the products of half precision differ with their number.
    doubles = [
        GenerateRequest(r.request_id, r.prompt_token_ids, r.max_tokens, SamplingParams())
        for r in crowd()
        if r.sampling not in PLAIN
    ]
    without = run(engine(), *plain, *doubles)
    for request in plain:
        assert with_others[request.request_id] == without[request.request_id]
