"""Chat templates that no one should have to trust."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import jinja2
import pytest

from quire.serve.errors import ApiError
from quire.serve.helpers import HelperLimits
from quire.serve.openai_protocol import ChatCompletionRequest, Message
from quire.serve.prompt import ChatTemplate, check_syntax
from quire.serve.request_decoder import RequestDecoder
from quire.serve.template_helpers import TemplateHelpers

DECODER = RequestDecoder(ChatCompletionRequest)
LIMITS = HelperLimits(processes=2, seconds=1.0, memory=256 << 20)
# Does whatever the first message says.
OBEDIENT = """
{%- if messages[0].content == 'loop' -%}
  {%- for i in range(99999) -%}{%- for j in range(99999) -%}{%- endfor -%}{%- endfor -%}
{%- elif messages[0].content == 'memory' -%}
  {{- 'a' * (10**9 + messages | length) -}}
{%- elif messages[0].content == 'raise' -%}
  {{- raise_exception('no such role') -}}
{%- else -%}
  {{- messages | tojson -}}
{%- endif -%}
"""


def messages(*contents: Any) -> list[Message]:
    items = [
        {"role": "user", "content": content} if isinstance(content, str) else content
        for content in contents
    ]
    return DECODER.decode(json.dumps({"model": "m", "messages": items}).encode()).messages


def run(
    source: str, test: Callable[[TemplateHelpers], Awaitable[None]], limits: HelperLimits = LIMITS
) -> None:
    async def check() -> None:
        async with TemplateHelpers(source, {"eos_token": "</s>"}, limits) as template:
            await test(template)

    asyncio.run(check())


def test_messages_are_rendered_as_in_this_process() -> None:
    source = "{{ messages | tojson }}{{ eos_token }}"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    chat = messages(
        {
            "role": "system",
            "content": [{"type": "text", "text": "ä"}, {"type": "text", "text": "b"}],
        },
        "hi",
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
        {"role": "developer", "content": "x"},
    )

    async def check(template: TemplateHelpers) -> None:
        assert template.source == source
        expected = ChatTemplate(source, {"eos_token": "</s>"}).render(chat).text
        assert (await template.render(chat)).text == expected

    run(source, check)


@pytest.mark.parametrize(
    ("order", "reason"),
    [("loop", "stopped after 1 s"), ("memory", "256 MiB"), ("raise", "no such role")],
)
def test_a_template_that_misbehaves_fails_its_own_request_only(order: str, reason: str) -> None:
    async def check(template: TemplateHelpers) -> None:
        async with asyncio.TaskGroup() as group:
            bad = group.create_task(refusal(template, order))
            good = [group.create_task(template.render(messages(f"{i}"))) for i in range(20)]
        assert reason in bad.result().message
        assert (bad.result().status, bad.result().param) == (400, "messages")
        for i, task in enumerate(good):
            assert json.loads(task.result().text)[0]["content"] == f"{i}"
        assert await template.render(messages("again"))

    run(OBEDIENT, check)


async def refusal(template: TemplateHelpers, order: str) -> ApiError:
    with pytest.raises(ApiError) as error:
        await template.render(messages(order))
    return error.value


def test_a_wrong_argument_is_blamed_on_its_place() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "no json"}}

    async def check(template: TemplateHelpers) -> None:
        with pytest.raises(ApiError) as error:
            await template.render(messages("hi", {"role": "assistant", "tool_calls": [call]}))
        assert error.value.param == "messages[1].tool_calls[0].function.arguments"

    run("{{ messages | tojson }}", check)


def test_constants_of_a_template_are_not_computed_in_the_server() -> None:
    source = "{{ 'a' * 10**12 }}"
    check_syntax(source)

    async def check(template: TemplateHelpers) -> None:
        error = await refusal(template, "hi")
        assert (error.status, error.param) == (400, "messages")

    run(source, check)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% for a in b %}"])
def test_a_template_that_cannot_be_read_is_found_before_it_runs(source: str) -> None:
    with pytest.raises(jinja2.TemplateSyntaxError):
        check_syntax(source)


def test_long_conversations_pass() -> None:
    async def check(template: TemplateHelpers) -> None:
        chat = messages(*["x" * 100_000] * 50)
        assert len((await template.render(chat)).text) > 5_000_000

    run(OBEDIENT, check, HelperLimits(processes=1, seconds=60, memory=256 << 20))


@pytest.mark.parametrize(
    ("filter", "expected"),
    [
        ("tojson", '{"b": "é", "a": [1]}'),
        ("tojson(ensure_ascii=true)", '{"b": "\\u00e9", "a": [1]}'),
        ("tojson(separators=(',', ':'), sort_keys=true)", '{"a":[1],"b":"é"}'),
        ("tojson(indent=1)", '{\n "b": "é",\n "a": [\n  1\n ]\n}'),
    ],
)
def test_json_is_written_as_templates_ask(filter: str, expected: str) -> None:
    source = f"{{{{ {{'b': 'é', 'a': [1]}} | {filter} }}}}"
    assert ChatTemplate(source, {}).render(messages("hi")).text == expected


def test_tools_switches_and_the_answers_opening_cross_over() -> None:
    source = (
        "{{ tools | tojson }}{{ messages[0].content }}"
        "{% if add_generation_prompt %}<{{ thinking }}>{% endif %}"
    )

    async def check(template: TemplateHelpers) -> None:
        tools = [{"z": 1, "a": {"y": [], "b": None}}]
        rendered = await template.render(messages("hi"), tools, {"thinking": True})
        assert rendered.text == '[{"z": 1, "a": {"y": [], "b": null}}]hi<True>'
        huge = await template.render(messages("hi"), [{"maximum": 2**70}])
        assert huge.text == f'[{{"maximum": {2**70}}}]hi<>'
        assert rendered.opening == "<True>"

    run(source, check)
