"""Messages through a chat template to token ids."""

import asyncio
import datetime
import json

import pytest
from fake_backend import TEMPLATE, RenderHere, byte_level_tokenizer

from quire.serve.errors import ApiError
from quire.serve.prompt import ChatTemplate, encode_chat, encode_texts
from quire.serve.protocol import ChatCompletionRequest, RequestDecoder
from quire.serve.text_encoder import TextEncoder

DECODER = RequestDecoder(ChatCompletionRequest)


def messages(*items: dict[str, object]):
    return DECODER.decode(json.dumps({"model": "m", "messages": items}).encode()).messages


def render(source: str, *items: dict[str, object], **special: str) -> str:
    return ChatTemplate(source, special).render(messages(*items))


USER = {"role": "user", "content": "hi"}
DUMP = "{{ messages | tojson }}"


def test_the_assistant_is_asked_to_speak():
    assert render(TEMPLATE, USER) == "<user>hi\n<assistant>"


def test_content_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", {"role": "user", "content": parts}) == "ab"


@pytest.mark.parametrize(
    ("source", "role"),
    [("{{ messages[0].role }}", "system"), ("{# developer #}{{ messages[0].role }}", "developer")],
)
def test_developer_is_system_to_templates_that_do_not_know_it(source, role):
    assert render(source, {"role": "developer", "content": "x"}) == role


def test_tool_messages_survive_with_parsed_arguments():
    call = {
        "id": "c1",
        "type": "function",
        "function": {"name": "f", "arguments": '{"x": "é"}'},
    }
    turns = json.loads(
        render(
            DUMP,
            {"role": "assistant", "content": None, "tool_calls": [call], "name": "bot"},
            {"role": "tool", "content": [{"type": "text", "text": "42"}], "tool_call_id": "c1"},
        )
    )
    assert turns == [
        {
            "role": "assistant",
            "content": None,
            "name": "bot",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
            ],
        },
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ]


AS_JSON = "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}"
AS_TEXT = "{% for c in m.tool_calls %}{{ '' + c.function.arguments }}{% endfor %}"
TOOL_TEMPLATES = {
    "text": ("{{ m.content or '' }}" + AS_TEXT, '?{"x": 1}'),
    "prints null": ("{{ m.content }}" + AS_JSON, '?{"x": 1}'),
    "wants null": ("{{ '!' if m.content is none else m.content }}" + AS_JSON, '?!{"x": 1}'),
    "fails on null": ("{{ m.content if 'x' not in m.content }}" + AS_JSON, '?{"x": 1}'),
    "no tools": ("{{ m.content }}", "?"),
}


@pytest.mark.parametrize(("turn", "expected"), TOOL_TEMPLATES.values(), ids=TOOL_TEMPLATES)
def test_tool_calls_are_written_as_the_template_takes_them(turn, expected):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assistant = {"role": "assistant", "content": None, "tool_calls": [call]}
    source = "{% for m in messages %}" + turn + "{% endfor %}"
    assert render(source, {"role": "user", "content": "?"}, assistant) == expected


@pytest.mark.parametrize("arguments", ["{", "[1]", "3"])
def test_tool_arguments_must_be_a_json_object(arguments):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    with pytest.raises(ApiError) as caught:
        render(DUMP, {"role": "assistant", "content": None, "tool_calls": [call]})
    assert caught.value.param == "messages[0].tool_calls[0].function.arguments"


def test_tojson_writes_text_as_it_is():
    assert render(DUMP, {"role": "user", "content": "<é>"}) == (
        '[{"role": "user", "content": "<é>"}]'
    )


def test_special_tokens_time_and_blocks():
    source = (
        "{{ bos_token }}{{ strftime_now('%Y') }}"
        "{%- for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    year = datetime.datetime.now().year
    assert render(source, USER, USER, bos_token="<s>") == f"<s>{year}hi"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ missing.attribute }}",
    ],
)
def test_what_a_template_refuses_is_blamed_on_the_messages(source):
    with pytest.raises(ApiError) as caught:
        render(source, USER)
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_the_templates_own_message_is_passed_on():
    with pytest.raises(ApiError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", USER)


def test_a_model_without_a_template_points_to_completions():
    with pytest.raises(ApiError, match="/v1/completions"):
        asyncio.run(encode_chat(TextEncoder(byte_level_tokenizer()), None, messages(USER)))


def test_special_tokens_are_added_to_completions_only():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level_tokenizer()
    end = tokenizer.token_to_id("<|end|>")
    tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", end)]
    )
    template = RenderHere("{{ messages[0].content }}", {})
    chat = asyncio.run(encode_chat(TextEncoder(tokenizer), template, messages(USER)))
    [completion] = asyncio.run(encode_texts(TextEncoder(tokenizer), ["hi"]))
    assert completion == [end, *chat]


def test_a_prompt_that_cannot_fit_is_refused_by_its_length(monkeypatch):
    encoder = TextEncoder(byte_level_tokenizer())
    monkeypatch.setattr(encoder, "encode_here", None)  # which would show if it were read
    with pytest.raises(ApiError) as caught:
        asyncio.run(encode_texts(encoder, ["fits", "x" * 5000], 10))
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    template = RenderHere("{{ messages[0].content * 1000 }}", {})
    with pytest.raises(ApiError, match="at least 286 by its length alone") as caught:
        asyncio.run(encode_chat(encoder, template, messages(USER), 100))
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")
