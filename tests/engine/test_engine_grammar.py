"""Requests with grammars in a batch with others: valid output, and nobody notices."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import mlx.core as mx
import pytest
from grammar_walk import EOS, grammar_tokenizer, small_tokenizer
from llguidance import LLMatcher
from mlx_lm.models import llama

from quire.engine.config import EngineConfig
from quire.engine.device_thread import DeviceThread
from quire.engine.engine import Engine
from quire.engine.errors import GrammarError
from quire.engine.grammar import GrammarCompiler
from quire.engine.grammar_queue import GrammarQueue, Masks
from quire.engine.messages import GenerateRequest, SamplingParams
from quire.engine.step_batch import StepBatch

END = small_tokenizer().token_to_id(EOS)
DRAW = SamplingParams(temperature=1.5, seed=5)


def schema_grammar(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "yy", "zzz"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "integer", "minimum": 10, "maximum": 99999},
    {"type": "string", "pattern": "^[a-z]{3,9}$"},
    {"anyOf": [{"const": "fixed value"}, {"type": "null"}]},
]


def make_model() -> llama.Model:
    mx.random.seed(0)
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
    model.eval()
    return model


def make_engine(**options: Any) -> Engine:
    defaults = {"num_blocks": 128, "max_num_seqs": 32, "max_num_batched_tokens": 64}
    grammars = GrammarCompiler(grammar_tokenizer(), threads=1)
    return Engine(make_model(), EngineConfig(**{**defaults, **options}), grammars=grammars)


def with_grammar(request_id: int, grammar: str, **options: Any) -> GenerateRequest:
    prompt = [7 + request_id % 5] * (3 + request_id % 20)
    settings = {"max_tokens": 60, "sampling": DRAW, "stop_token_ids": [END], **options}
    return GenerateRequest(request_id, prompt, grammar=grammar, **settings)


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    reason: str | None = None
    error: str | None = None

    @property
    def text(self) -> str:
        return str(small_tokenizer().decode([token for token in self.token_ids if token != END]))


def run(engine: Engine, *requests: GenerateRequest) -> dict[int, Answer]:
    answers = {request.request_id: Answer() for request in requests}
    for request in requests:
        try:
            engine.submit(request)
        except GrammarError as error:  # known at once, if it has been compiled by then
            answers[request.request_id] = Answer([], "error", str(error))
    while engine.has_work:
        for output in engine.step():
            answer = answers[output.request_id]
            assert answer.reason is None
            answer.token_ids += output.token_ids
            answer.reason, answer.error = output.finish_reason, output.error
    engine.scheduler.check()
    return answers


def structured(count: int) -> list[GenerateRequest]:
    return [with_grammar(i, schema_grammar(SCHEMAS[i % len(SCHEMAS)])) for i in range(count)]


def plain(first: int, count: int) -> list[GenerateRequest]:
    return [
        GenerateRequest(i, [i % 90] * (1 + i % 30), 30, SamplingParams(temperature=0.9, seed=i))
        for i in range(first, first + count)
    ]


def check_valid(answers: dict[int, Answer], requests: list[GenerateRequest]) -> None:
    for request in requests:
        answer = answers[request.request_id]
        assert answer.reason == "stop", answer
        schema = SCHEMAS[request.request_id % len(SCHEMAS)]
        jsonschema.validate(json.loads(answer.text), schema)


@pytest.mark.parametrize("options", [{"encode_ahead": False}, {"encode_ahead": True}])
def test_output_fits_the_grammar_and_neighbours_draw_what_they_draw_alone(
    options: dict[str, Any],
) -> None:
    grammar_rows, others = structured(10), plain(100, 6)
    answers = run(make_engine(**options), *grammar_rows, *others)
    check_valid(answers, grammar_rows)
    without = run(make_engine(**options), *others)
    for request in others:
        assert answers[request.request_id] == without[request.request_id]
        assert answers[request.request_id].reason == "length"
    for request in grammar_rows[:5]:
        alone = run(make_engine(**options), request)
        assert alone[request.request_id] == answers[request.request_id]


def test_the_same_on_two_threads() -> None:
    requests = [*structured(10), *plain(100, 6)]
    expected = run(make_engine(), *requests)
    device = DeviceThread()
    engine = make_engine(encode_ahead=True)
    engine.encode_on(device)
    assert device.run_beside(lambda: run(engine, *requests)) == expected


def test_preempted_sequences_go_on_in_their_grammar() -> None:
    grammar = LLMatcher.grammar_from_regex("([a-z][0-9]){40}")
    requests = [with_grammar(i, grammar, max_tokens=80) for i in range(6)]
    expected = run(make_engine(), *requests)
    assert all(answer.reason == "stop" for answer in expected.values())
    tight = make_engine(num_blocks=10)
    assert run(tight, *requests) == expected
    assert tight.stats().preemptions > 0


def test_the_grammars_end_is_the_answers_end() -> None:
    grammar = LLMatcher.grammar_from_lark('start: "abc"')
    for options in ({}, {"stop_token_ids": []}, {"min_tokens": 50}):
        answer = run(make_engine(), with_grammar(0, grammar, **options))[0]
        assert (answer.text, answer.reason) == ("abc", "stop")


def test_an_answer_that_may_end_goes_on_to_its_least_length() -> None:
    grammar = LLMatcher.grammar_from_regex("a{0,200}")
    request = with_grammar(0, grammar, min_tokens=20, max_tokens=200)
    answer = run(make_engine(), request)[0]
    assert answer.reason == "stop"
    assert len(answer.token_ids) >= 20
    assert set(answer.text) == {"a"}


def test_an_answer_may_be_cut_off() -> None:
    grammar = LLMatcher.grammar_from_regex("a{200}b")
    answer = run(make_engine(), with_grammar(0, grammar, max_tokens=10))[0]
    assert (answer.reason, len(answer.token_ids)) == ("length", 10)


def test_a_wrong_grammar_fails_its_own_request() -> None:
    bad = with_grammar(50, "start: missing")
    requests = [*structured(5), *plain(100, 3)]
    engine = make_engine()
    answers = run(engine, bad, *requests)
    assert answers[50].reason == "error"
    assert "unknown name" in (answers[50].error or "")
    check_valid(answers, requests[:5])
    with pytest.raises(GrammarError, match="unknown name"):
        engine.submit(with_grammar(51, "start: missing"))


def test_a_grammar_that_fails_as_it_runs_ends_its_own_request() -> None:
    # More than a row of the parser holds, which shows behind the first brace.
    properties: dict[str, Any] = {f"p{i}": {} for i in range(2000)}
    exploding = schema_grammar({"type": "object", "properties": properties})
    bad = with_grammar(50, exploding)
    requests = [*structured(5), *plain(100, 3)]
    answers = run(make_engine(), bad, *requests)
    check_valid(answers, requests[:5])
    assert answers[50].reason == "error"
    assert "the grammar failed" in (answers[50].error or "")


@pytest.mark.parametrize(("encode_ahead", "leaves"), [(False, False), (True, False), (True, True)])
def test_a_grammar_may_fail_while_a_mask_is_filled(
    monkeypatch: pytest.MonkeyPatch, leaves: bool, encode_ahead: bool
) -> None:
    requests = structured(6)
    answers = {request.request_id: Answer() for request in requests}
    engine = make_engine(encode_ahead=encode_ahead)
    fill_masks = GrammarQueue.fill_masks
    failures = 0

    def fail(queue: GrammarQueue, batch: StepBatch) -> Masks:
        nonlocal failures
        masks = fill_masks(queue, batch)
        for chunk in batch.sampled:
            if chunk.sequence.request.request_id == 0 and chunk.output_index == 3:
                failures += 1
                masks.failed.append((chunk.sequence, GrammarError("too deep")))
        return masks

    monkeypatch.setattr(GrammarQueue, "fill_masks", fail)
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        # The mask is known to have failed when the step after begins.
        for output in engine.step(lambda: engine.abort(0) if leaves and failures else None):
            answer = answers[output.request_id]
            answer.token_ids += output.token_ids
            answer.reason, answer.error = output.finish_reason, output.error
    engine.scheduler.check()
    assert failures == 1
    failed = answers.pop(0)
    assert len(failed.token_ids) == 3
    assert failed.error == (None if leaves else "too deep")
    check_valid(answers, [request for request in requests if request.request_id != 0])


def test_an_engine_without_a_tokenizer_says_so() -> None:
    engine = Engine(make_model(), EngineConfig(num_blocks=16))
    with pytest.raises(GrammarError, match="takes no grammars"):
        engine.submit(with_grammar(0, "start: /a/"))
    assert not engine.has_work


def test_a_request_may_leave_while_its_grammar_is_compiled() -> None:
    engine = make_engine()
    strings = {f"p{i}": {"type": "string", "pattern": f"[a-z]{{{i % 9 + 1}}}"} for i in range(900)}
    heavy = with_grammar(0, schema_grammar({"type": "object", "properties": strings}))
    engine.submit(heavy)
    assert engine.has_work
    assert engine.stats().requests_waiting == 1
    engine.abort(0)
    assert not engine.has_work
    check_valid(run(engine, *structured(5)), structured(5))


@pytest.mark.parametrize("when", [1, 2, 3, 4])
def test_a_request_may_leave_between_any_two_steps(when: int) -> None:
    engine = make_engine(encode_ahead=when % 2 == 0)
    requests = structured(10)
    answers = {request.request_id: Answer() for request in requests}
    for request in requests:
        engine.submit(request)
    leave: Callable[[int], bool] = lambda request_id: request_id % 3 == 0  # noqa: E731
    steps = 0
    while engine.has_work:
        outputs = engine.step()
        steps += bool(outputs)
        for output in outputs:
            answers[output.request_id].token_ids += output.token_ids
            answers[output.request_id].reason = output.finish_reason
        if steps == when:
            for request in requests:
                if leave(request.request_id):
                    engine.abort(request.request_id)
    engine.scheduler.check()
    check_valid(answers, [request for request in requests if not leave(request.request_id)])
