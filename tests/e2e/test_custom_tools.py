"""Custom tools of the Responses API whose input has a grammar, on a model that knows nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from live_server import Server
from openai import OpenAI

LINES = """start: "*** Begin" LF line+ "*** End"
line: ("+" | "-") /[a-z <"]{0,8}/ LF
%import common.LF
"""
PATTERN = r'\*\*\* Begin\n([+-][a-z <"]{0,8}\n)+\*\*\* End'


@pytest.fixture(scope="module")
def client(small_model: Path) -> Iterator[OpenAI]:
    flags = ("--kv-cache-memory", "4MiB", "--tool-parser", "qwen_xml")
    server = Server(*flags, model=small_model)
    try:
        server.wait_ready()
        with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
            yield made
    finally:
        server.stop()


def custom(syntax: str, definition: str) -> dict[str, Any]:
    form = {"type": "grammar", "syntax": syntax, "definition": definition}
    return {"type": "custom", "name": "edit", "description": "Edits.", "format": form}


def ask(client: OpenAI, tool: dict[str, Any], **fields: Any) -> Any:
    choice = {"type": "custom", "name": "edit"}
    fields |= {"max_output_tokens": 500, "parallel_tool_calls": False}
    return client.responses.create(
        model="small", input="?", tools=[tool], tool_choice=choice, **fields
    )


@pytest.mark.parametrize(
    ("tool", "pattern"),
    [(custom("lark", LINES), PATTERN), (custom("regex", "[a-f]{3}-[0-9]"), r"[a-f]{3}-[0-9]")],
    ids=["lark", "regex"],
)
def test_the_input_fits(client: OpenAI, tool: dict[str, Any], pattern: str) -> None:
    answer = ask(client, tool, temperature=0.7)
    [item] = answer.output
    assert (item.type, item.name, answer.status) == ("custom_tool_call", "edit", "completed")
    assert re.fullmatch(pattern, item.input), item.input
    deltas = []
    for event in ask(client, tool, temperature=0.7, stream=True):
        if event.type == "response.custom_tool_call_input.delta":
            deltas.append(event.delta)
    assert re.fullmatch(pattern, "".join(deltas))


def test_a_grammar_that_cannot_be_read_is_named(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, custom("lark", "start: ("))
    assert refused.value.param == "tools[0].format.definition"
