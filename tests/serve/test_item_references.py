"""Items of /v1/responses that stand for stored ones, as the AI SDK sends them."""

from __future__ import annotations

import pytest
from test_chat_tools import says
from test_responses_api import PATH, SAID, TOOLS, ask, body, prompt_of, responses

from quire.serve.raw_body import LARGE_BODY
from quire.serve.routes import responses as responses_route


def test_references_stand_for_what_is_stored() -> None:
    """As the AI SDK sends a conversation again, in bodies of any size."""
    user = {"role": "user", "content": "hi"}
    padding = {"type": "web_search_call", "id": "ws", "status": "x" * LARGE_BODY}
    scripts = [says(SAID), says("Sunny."), says("Again."), says("a")]
    with responses(*scripts) as (server, client, backend):
        first = ask(client, False, tools=TOOLS)
        items = [{"type": "item_reference", "id": item.id} for item in first.output]
        result = {"type": "function_call_output", "call_id": first.output[2].call_id, "output": "x"}
        talk = [user, *items, result]
        for given in (talk, [padding, *talk]):
            assert ask(client, False, input=given, tools=TOOLS).status == "completed"
        client.responses.delete(first.id)
        gone = server.request("POST", PATH, body(input=talk))
        odd = {**user, "id": None, "content": "what is an item_reference?"}
        assert server.request("POST", PATH, body(input=[odd])).status == 200
        for wrong in (None, 5):
            reply = server.request("POST", PATH, body(input=[{**items[0], "id": wrong}]))
            assert (reply.status, reply.error["param"]) == (400, "input[0].id")
    assert gone.error["param"] == "input[1].id"
    calls = '[weather {"city": "Rome", "days": 3}][clock {}]'
    expected = f"<user>hi<assistant>(Hm.)Let me see.{calls}<tool>x<assistant>"
    assert prompt_of(backend, 1).endswith("]" + expected)
    assert prompt_of(backend, 2) == prompt_of(backend, 1)


def test_references_do_not_multiply_a_body_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses_route, "MAX_BODY_BYTES", 10_000)
    with responses(says("x" * 500)) as (server, client, _):
        (item,) = ask(client, False).output
        reference = {"type": "item_reference", "id": item.id}
        user = {"role": "user", "content": "hi"}
        reply = server.request("POST", PATH, body(input=[*[reference] * 100, user]))
    assert reply.status == 413
