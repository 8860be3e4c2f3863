"""Thinking ends where its budget does, and nothing else of the answer changes."""

from __future__ import annotations

import random
from typing import Any

import pytest
from grammar_walk import grammar_tokenizer, small_tokenizer
from llguidance import LLMatcher
from mlx_lm.models import llama
from model_zoo import build

from quire.engine.config import EngineConfig
from quire.engine.engine import Engine
from quire.engine.grammar import GrammarCompiler
from quire.engine.messages import GenerateRequest, SamplingParams, ThinkingBudget

GREEDY = SamplingParams(temperature=0)
CLOSE = [150, 151]  # tokens that the model does not draw by itself here


def make_engine(**options: Any) -> Engine:
    defaults = {"num_blocks": 128, "max_num_seqs": 32, "max_num_batched_tokens": 64}
    return Engine(build("llama"), EngineConfig(**{**defaults, **options}))


def request(
    request_id: int, budget: ThinkingBudget | None = None, params: SamplingParams = GREEDY
) -> GenerateRequest:
    draw = random.Random(request_id)
    prompt = [draw.randrange(100) for _ in range(5 + request_id)]
    return GenerateRequest(request_id, prompt, 24, params, thinking=budget)


def run(engine: Engine, *requests: GenerateRequest) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {request.request_id: [] for request in requests}
    for each in requests:
        engine.submit(each)
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    engine.scheduler.check()
    return tokens


@pytest.mark.parametrize("encode_ahead", [False, True])
@pytest.mark.parametrize("limit", [0, 1, 2, 9, 30])
def test_thoughts_are_closed_when_the_budget_is_spent(limit: int, encode_ahead: bool) -> None:
    free = run(make_engine(), request(3))[3]
    budget = ThinkingBudget(limit, CLOSE, starts_open=True)
    tokens = run(make_engine(encode_ahead=encode_ahead), request(3, budget))[3]
    assert tokens[:limit] == free[:limit]
    assert tokens[limit : limit + 2] == CLOSE[: 24 - limit]
    assert len(tokens) == 24
    # And then the model goes on freely.
    known = [*request(3).prompt_token_ids, *tokens[: limit + 2]]
    rest = run(make_engine(), GenerateRequest(0, known, max(1, 22 - limit), GREEDY))[0]
    assert tokens[limit + 2 :] == rest[: len(tokens[limit + 2 :])]


def test_blocks_that_the_model_opens_and_closes_share_one_budget() -> None:
    free = run(make_engine(), request(3))[3]
    assert len(set(free[:8])) == 8
    ends_itself = ThinkingBudget(6, [free[4]], starts_open=True)
    assert run(make_engine(), request(3, ends_itself))[3][:5] == free[:5]
    opened = ThinkingBudget(4, CLOSE, open_token_ids=free[1:3])
    tokens = run(make_engine(), request(3, opened))[3]
    assert tokens[:7] == free[:7]
    assert tokens[7:9] == CLOSE
    never_opened = ThinkingBudget(0, CLOSE, open_token_ids=[159])
    assert run(make_engine(), request(3, never_opened))[3] == free
    # Two tokens in the first block, so that one is left for the second.
    twice = ThinkingBudget(3, [free[3]], open_token_ids=[free[0]], starts_open=False)
    assert run(make_engine(), request(3, twice))[3][:4] == free[:4]


def test_neighbours_notice_nothing_and_a_batch_is_as_each_alone() -> None:
    kinds = [
        None,
        ThinkingBudget(3, CLOSE, starts_open=True),
        ThinkingBudget(7, [150], starts_open=True),
        ThinkingBudget(2, CLOSE, open_token_ids=[13]),
    ]
    params = [GREEDY, SamplingParams(seed=4), SamplingParams(seed=5, presence_penalty=1)]
    requests = [request(i, kinds[i % 4], params[i % 3]) for i in range(24)]
    together = run(make_engine(), *requests)
    for each in requests:
        assert run(make_engine(), each)[each.request_id] == together[each.request_id]
    tight = make_engine(num_blocks=14)
    assert run(tight, *requests) == together
    assert tight.stats().preemptions > 0


def test_a_block_that_opens_with_nothing_left_closes_alike_however_it_is_scheduled() -> None:
    free = run(make_engine(), request(6))[6]
    at = next(i for i in range(24) if free.index(free[i]) == i and free[i] not in CLOSE)
    spent = request(6, ThinkingBudget(0, CLOSE, open_token_ids=[free[at]]))
    alone = run(make_engine(), spent)[6]
    assert alone[: at + 2] == free[: at + 2]  # one token passes behind the opener
    assert alone[at + 2 : at + 4] == CLOSE
    assert run(make_engine(encode_ahead=True), spent)[6] == alone
    neighbours = [GenerateRequest(100 + i, [i] * 20, 30, GREEDY) for i in range(4)]
    tight = make_engine(num_blocks=11)
    assert run(tight, *neighbours, spent)[6] == alone
    assert tight.stats().preemptions > 0


def test_what_follows_on_thoughts_fits_the_grammar() -> None:
    tokenizer = small_tokenizer()
    close = tokenizer.encode("</t>", add_special_tokens=False).ids
    model = llama.Model(
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
    grammar = LLMatcher.grammar_from_lark('start: /[^<]*/ "</t>" /[ab]{3}/')
    engine = Engine(
        model,
        EngineConfig(num_blocks=64, max_num_batched_tokens=100),
        None,
        GrammarCompiler(grammar_tokenizer(), threads=1),
    )
    budget = ThinkingBudget(5, close, starts_open=True)
    for request_id in range(4):
        params = SamplingParams(temperature=1.5, seed=request_id)
        asked = GenerateRequest(request_id, [7, 8, 9], 60, params, grammar=grammar, thinking=budget)
        text = tokenizer.decode(run(engine, asked)[request_id])
        thoughts, closer, answer = text.partition("</t>")
        assert closer
        assert set(answer[:3]) <= {"a", "b"}
        assert len(tokenizer.encode(thoughts, add_special_tokens=False).ids) <= 5 + len(close)
