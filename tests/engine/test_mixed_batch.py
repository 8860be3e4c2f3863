"""Thirty-two requests that ask for everything at once: each is answered as if it were alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
from test_engine_grammar import END, SCHEMAS, make_engine, schema_grammar

from quire.engine.engine import Engine
from quire.engine.messages import (
    GenerateRequest,
    SamplingParams,
    ThinkingBudget,
    TokenLogprobs,
)

CLOSE = 1e-4  # sums of another order are rounded in other places


def requests() -> list[GenerateRequest]:
    draw = random.Random(8)

    def maybe(*values: Any, otherwise: Any) -> Any:
        return draw.choice(values) if draw.random() < 0.4 else otherwise

    made = []
    for i in range(32):
        grammar = schema_grammar(SCHEMAS[i % len(SCHEMAS)]) if draw.random() < 0.4 else ""
        params = SamplingParams(
            temperature=draw.choice([0.0, 0.8, 1.5]),
            top_k=maybe(1, 12, otherwise=0),
            top_p=maybe(0.7, 0.95, otherwise=1.0),
            min_p=maybe(0.02, otherwise=0.0),
            seed=draw.randrange(1 << 40),
            logit_bias=maybe({5: 2.0, 9: -100.0}, {70: 1.5}, otherwise={}),
            presence_penalty=maybe(-1.0, 1.5, otherwise=0.0),
            frequency_penalty=maybe(0.4, -0.3, otherwise=0.0),
            repetition_penalty=maybe(0.8, 1.3, otherwise=1.0),
            allowed_token_ids=[] if grammar else maybe(list(range(10, 80)), otherwise=[]),
            bad_words=maybe([[20], [30, 31]], otherwise=[]),
        )
        budget = ThinkingBudget(4, close_token_ids=[33, 34], starts_open=True)
        thinking = None if grammar else maybe(budget, otherwise=None)
        made.append(
            GenerateRequest(
                i,
                [7 + draw.randrange(80) for _ in range(draw.choice([1, 3, 20, 45]))],
                draw.randint(5, 40),
                params,
                min_tokens=maybe(3, otherwise=0),
                stop_token_ids=[END],
                grammar=grammar,
                logprobs=maybe(0, 3, 20, otherwise=None),
                prompt_logprobs=maybe(0, 2, otherwise=None),
                priority=maybe(-1, 2, otherwise=0),
                thinking=thinking,
            )
        )
    return made


Answer = tuple[list[int], list[str | None], list[TokenLogprobs]]


def run(engine: Engine, *asked: GenerateRequest) -> dict[int, Answer]:
    answers: dict[int, Answer] = {request.request_id: ([], [], []) for request in asked}
    for request in asked:
        engine.submit(request)
    while engine.has_work:
        for output in engine.step():
            tokens, reasons, logprobs = answers[output.request_id]
            tokens += output.token_ids
            reasons.append(output.finish_reason)
            logprobs += output.logprobs + output.prompt_logprobs
    engine.scheduler.check()
    return answers


def numbers(entries: list[TokenLogprobs]) -> list[float]:
    return [x for entry in entries for x in (entry.logprob, *entry.top_logprobs)]


@pytest.mark.parametrize("options", [{}, {"encode_ahead": True}, {"num_blocks": 14}], ids=repr)
def test_a_batch_is_as_each_alone(options: dict[str, Any]) -> None:
    asked = requests()
    assert sum(bool(request.grammar) for request in asked) > 5
    together = run(make_engine(**options), *asked)
    for request in asked:
        tokens, reasons, logprobs = together[request.request_id]
        expected = run(make_engine(), request)[request.request_id]
        assert tokens == expected[0], request
        assert reasons[-1] == expected[1][-1]
        assert numbers(logprobs) == pytest.approx(numbers(expected[2]), abs=CLOSE)
