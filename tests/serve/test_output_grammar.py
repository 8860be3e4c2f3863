"""What requests ask of their output's form: checked in helpers, answered with reason and place."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grammar_walk import EOS, draw_text, may_end, small_tokenizer, start

from quire.serve.errors import ApiError
from quire.serve.grammar import (
    CHECK_LIMITS,
    JSON_OBJECT,
    GrammarChecker,
    choice_request,
)
from quire.serve.grammar_check import CheckRequest
from quire.serve.helpers import HelperLimits
from quire.serve.lark import ReasoningForm, markers_of

FIELD = "response_format.json_schema.schema"
# Seconds of work: none of the names may fit two of the patterns.
LONG = {
    "patternProperties": {
        f"^{chr(ord('a') + i % 26)}{i}[a-z]*$": {"type": "string"} for i in range(300)
    }
}
# Many megabytes for its 60 kB.
LARGE = {
    "type": "object",
    "properties": {f"p{i}": {"type": "string", "pattern": f"^[a-z]{{{i}}}$"} for i in range(1000)},
    "additionalProperties": False,
}
THINK = ReasoningForm("<think>", "</think>", is_open=True)


def schema(value: dict[str, Any], *, strict: bool = True) -> CheckRequest:
    return CheckRequest("json_schema", json.dumps(value), strict)


def run(
    tmp_path: Path,
    test: Callable[[GrammarChecker], Awaitable[None]],
    limits: HelperLimits = CHECK_LIMITS,
) -> None:
    async def check() -> None:
        file = tmp_path / "tokenizer.json"
        small_tokenizer().save(str(file))
        eos, markers = small_tokenizer().token_to_id(EOS), markers_of(small_tokenizer())
        async with GrammarChecker(str(file), [eos], markers, limits) as checker:
            await test(checker)

    asyncio.run(check())


async def refusal(checker: GrammarChecker, wanted: CheckRequest, param: str = FIELD) -> ApiError:
    with pytest.raises(ApiError) as error:
        await checker.check(wanted, param)
    return error.value


def test_checked_grammars_run(tmp_path: Path) -> None:
    async def check(checker: GrammarChecker) -> None:
        rng = np.random.default_rng(0)
        wanted: list[tuple[CheckRequest, str]] = [
            (choice_request(["yes", "no", 'a "b"\n']), r'yes|no|a "b"\n'),
            (choice_request([str(i) for i in range(9000)]), r"[0-8]?[0-9]{1,3}"),
            (choice_request(["0"] * 10_000), "0"),
            (CheckRequest("regex", "[0-9]{2}/(a|b)+"), r"[0-9]{2}/(a|b)+"),
            (CheckRequest("lark", 'start: "x" (y "," y)?\ny: /[0-9]/'), r"x([0-9],[0-9])?"),
        ]
        for request, pattern in wanted:
            grammar = await checker.check(request, "structured_outputs")
            for _ in range(10):
                text = draw_text(start(grammar), rng)
                assert re.fullmatch(pattern, text.content.decode()) or not text.is_complete
        grammar = await checker.check(JSON_OBJECT, "response_format")
        assert isinstance(json.loads(draw_text(start(grammar), rng).content), dict)

    run(tmp_path, check)


def test_refusals_name_the_field_and_the_place(tmp_path: Path) -> None:
    async def check(checker: GrammarChecker) -> None:
        error = await refusal(checker, schema({"properties": {"a": {"not": {}}}}))
        assert (error.status, error.param) == (400, f"{FIELD}.properties.a")
        assert error.message == f"{FIELD}.properties.a cannot be used: not supported: not."
        error = await refusal(checker, CheckRequest("regex", "(a"), "structured_outputs.regex")
        assert (error.status, error.param) == (400, "structured_outputs.regex")
        assert "unclosed group" in error.message
        assert "\n" not in error.message
        deep = '{"items":' * 4000 + "{}" + "}" * 4000
        error = await refusal(checker, CheckRequest("json_schema", deep))
        assert (error.status, "nested too deeply" in error.message) == (400, True)
        error = await refusal(checker, CheckRequest("regex", "a" * 70_000), "x")
        assert (error.status, "65536" in error.message) == (400, True)

    run(tmp_path, check)


@pytest.mark.parametrize(
    ("heavy", "limits"), [(LONG, {"seconds": 0.2}), (LARGE, {"memory": 8 << 20})]
)
def test_what_takes_too_long_or_too_much_is_too_complex_and_harms_nobody(
    tmp_path: Path, heavy: dict[str, Any], limits: dict[str, Any]
) -> None:
    async def check(checker: GrammarChecker) -> None:
        others = [schema({"const": i}) for i in range(20)]
        async with asyncio.TaskGroup() as group:
            bad = group.create_task(refusal(checker, schema(heavy)))
            good = [group.create_task(checker.check(other, FIELD)) for other in others]
        assert (bad.result().status, bad.result().param) == (400, FIELD)
        assert "too complex" in bad.result().message
        assert all(task.result() for task in good)

    run(tmp_path, check, HelperLimits(processes=1, **{"seconds": 20.0, **limits}))


def test_answers_are_kept_and_shared(tmp_path: Path) -> None:
    async def check(checker: GrammarChecker) -> None:
        asked: list[Any] = []
        call = checker._pool.call

        async def count(request: Any, payload: Any = ()) -> Any:
            asked.append(request)
            return await call(request, payload)

        checker._pool.call = count  # type: ignore[method-assign]
        same = [checker.check(schema({"type": "object"}), FIELD) for _ in range(20)]
        assert len(set(await asyncio.gather(*same))) == 1
        for _ in range(3):
            await refusal(checker, schema({"not": {}}))
        assert len(asked) == 2
        # One client leaves; the other, who waits for the same, gets the answer.
        wanted = schema({"const": "new"})
        leaver = asyncio.create_task(checker.check(wanted, FIELD))
        stayer = asyncio.create_task(checker.check(wanted, FIELD))
        await asyncio.sleep(0)
        leaver.cancel()
        assert await stayer
        for i in range(300):
            await checker.check(choice_request([str(i)]), "x")
        assert len(checker._kept) <= 256

    run(tmp_path, check)


def test_where_too_many_wait_the_answer_is_503_and_not_kept(tmp_path: Path) -> None:
    async def check(checker: GrammarChecker) -> None:
        await checker.check(JSON_OBJECT, FIELD)
        many = [checker.check(choice_request([str(i)]), "x") for i in range(20)]
        answers = await asyncio.gather(*many, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, ApiError)]
        assert refused
        assert {error.status for error in refused} == {503}
        for i in range(20):
            assert await checker.check(choice_request([str(i)]), "x")

    run(tmp_path, check, HelperLimits(processes=1, waiting=4))


FORMS = [
    # Tokens of their own, texts, and a channel's header before the answer.
    THINK,
    ReasoningForm("<think>", "</think>", is_open=False),
    ReasoningForm("[T]", "[/T]", is_open=True),
    ReasoningForm("[T]", "[/T]", is_open=False),
    ReasoningForm("<think>thought\n", "</think>", is_open=False),
    ReasoningForm("<think>", "</think>", is_open=False, before_answer="<|call|>final\n"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("thought", ["", "Well, [/", "a\n\nb ünï {"])
def test_reasoning_comes_before_the_output_in_one_pass(
    tmp_path: Path, form: ReasoningForm, thought: str
) -> None:
    opener = "" if form.is_open else form.opener

    async def check(checker: GrammarChecker) -> None:
        wanted = CheckRequest("json_schema", '{"type":"object","required":["a"]}', reasoning=form)
        grammar = await checker.check(wanted, FIELD)
        for blank in ("", "\n\n"):
            state = start(grammar)
            prefix = opener + thought + form.closer + blank + form.before_answer
            for token in small_tokenizer().encode(prefix).ids:
                state.accept(token)
            text = draw_text(state, np.random.default_rng(3))
            assert text.is_complete
            assert "a" in json.loads(text.content)

    run(tmp_path, check)


def test_what_the_prompt_opened_must_be_closed_and_what_it_did_not_may_be_left_out(
    tmp_path: Path,
) -> None:
    async def check(checker: GrammarChecker) -> None:
        for form in FORMS:
            wanted = CheckRequest("choice", '["yes"]', reasoning=form)
            state = start(await checker.check(wanted, FIELD))
            for token in small_tokenizer().encode(form.before_answer + "yes").ids:
                state.accept(token)
            assert may_end(state) == (not form.is_open)

    run(tmp_path, check)
