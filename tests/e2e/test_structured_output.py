"""Output of a wanted form from a real server, whose model knows nothing of JSON."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
import pytest
from live_server import Server
from openai import OpenAI

MODEL = "small"
USER = [{"role": "user", "content": "?"}]


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def schema_format(schema: dict[str, Any], strict: bool = True) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": strict}}


def colours(index: int) -> dict[str, Any]:
    """A schema of its own for each index."""
    return {
        "type": "object",
        "properties": {
            f"field_{index}": {"enum": ["red", "green", "blue"]},
            "ok": {"type": "boolean"},
            "many": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        },
        "required": [f"field_{index}", "ok"],
        "additionalProperties": False,
    }


def test_64_schemas_at_once_beside_plain_requests(client: OpenAI) -> None:
    def structured(index: int) -> None:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=USER,  # type: ignore[arg-type]
            response_format=schema_format(colours(index)),  # type: ignore[arg-type]
            temperature=1.5,
            seed=index,
            max_tokens=600,
        )
        [choice] = answer.choices
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content or ""), colours(index))
        finished.append(choice.finish_reason)

    def plain(index: int) -> str:
        answer = client.completions.create(
            model=MODEL, prompt="abc", max_tokens=40, temperature=1, seed=index
        )
        return answer.choices[0].text

    finished: list[str] = []
    alone = [plain(index) for index in range(4)]
    with ThreadPoolExecutor(72) as threads:
        others = [threads.submit(plain, index) for index in range(4)]
        list(threads.map(structured, range(64)))
        assert [other.result() for other in others] == alone
    assert finished.count("stop") > 50


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"choice": ["left", "right"]}, "left|right"),
        ({"grammar": 'start: "<" /[a-z]/ ">"'}, "<[a-z]>"),
    ],
)
def test_forms_beside_json_streamed_and_whole(
    client: OpenAI, outputs: dict[str, Any], pattern: str
) -> None:
    fields: dict[str, Any] = {"model": MODEL, "temperature": 1.5, "seed": 3, "max_tokens": 50}
    body = {"structured_outputs": outputs}
    chat = client.chat.completions.create(messages=USER, extra_body=body, **fields)
    text = client.completions.create(prompt="x", extra_body=body, **fields)
    stream = client.completions.create(prompt="x", extra_body=body, stream=True, **fields)
    chunks = [chunk.choices[0] for chunk in stream]
    assert re.fullmatch(pattern, chat.choices[0].message.content or "")
    assert re.fullmatch(pattern, text.choices[0].text)
    assert "".join(choice.text for choice in chunks) == text.choices[0].text
    assert chunks[-1].finish_reason == text.choices[0].finish_reason == "stop"


def test_a_json_object_is_one_even_where_eos_is_ignored(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=USER,  # type: ignore[arg-type]
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=300,
        logit_bias=None,
        extra_body={"ignore_eos": True},
    )
    [choice] = answer.choices
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content or ""), dict)


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        (
            {"response_format": schema_format({"properties": {"a": {"not": {}}}})},
            "response_format.json_schema.schema.properties.a",
            "not supported: not",
        ),
        (
            {"extra_body": {"structured_outputs": {"regex": "(a"}}},
            "structured_outputs.regex",
            "unclosed group",
        ),
        (
            {"extra_body": {"structured_outputs": {"grammar": "start: b"}}},
            "structured_outputs.grammar",
            "unknown name",
        ),
    ],
)
def test_what_cannot_be_honoured_is_a_400_with_its_place(
    client: OpenAI, fields: dict[str, Any], param: str, reason: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=MODEL, messages=USER, **fields)  # type: ignore[arg-type]
    assert error.value.param == param
    assert reason in str(error.value)
