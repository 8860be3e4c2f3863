"""Every field is honoured, harmless or refused by name."""

import contextlib
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams

from quire.serve.errors import ApiError
from quire.serve.openai_protocol import ChatCompletionRequest, CompletionRequest, TokenizeRequest
from quire.serve.request_decoder import REFUSED, RequestDecoder

CHAT = RequestDecoder(ChatCompletionRequest)
COMPLETION = RequestDecoder(CompletionRequest)
MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**fields: object) -> ChatCompletionRequest:
    return CHAT.decode(json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode())


def completion(**fields: object) -> CompletionRequest:
    return COMPLETION.decode(json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


def refusal(make, **fields: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        make(**fields)
    assert caught.value.status == 400
    assert "\n" not in caught.value.message
    return caught.value


UNSUPPORTED = [
    (chat, {"functions": [{"name": "f"}]}),
    (chat, {"function_call": {"name": "f"}}),
    (chat, {"modalities": ["text", "audio"]}),
    (chat, {"audio": {"voice": "alloy", "format": "wav"}}),
    (chat, {"prediction": {"type": "content", "content": "x"}}),
    (chat, {"verbosity": "low"}),
    (chat, {"web_search_options": {}}),
    (chat, {"moderation": {"type": "auto"}}),
]


@pytest.mark.parametrize(("make", "fields"), UNSUPPORTED)
def test_an_unsupported_field_names_itself(make, fields):
    [field] = fields
    error = refusal(make, **fields)
    assert error.param == field
    assert field in error.message
    assert "not supported" in error.message


def test_every_refused_field_has_a_case():
    assert {field for _, fields in UNSUPPORTED for field in fields} == set(REFUSED)


TOOL = {"type": "function", "function": {"name": "f"}}
NAMED = {"type": "function", "function": {"name": "g"}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{**TOOL, "function": {"name": "f", "strict": 1}}]}, "tools[0].function.strict"),
        ({"tools": [TOOL], "tool_choice": NAMED}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice[1]"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"thinking": []}}, "chat_template_kwargs.thinking"),
    ],
)
def test_tools_and_switches_that_cannot_be_used_name_their_place(fields, param):
    assert refusal(chat, **fields).param == param


OUT_OF_RANGE = [
    (chat, "max_tokens", 0),
    (chat, "max_tokens", "5"),
    (chat, "max_completion_tokens", 0),
    (chat, "min_tokens", -1),
    (chat, "temperature", 2.1),
    (chat, "temperature", -0.1),
    (chat, "temperature", "hot"),
    (chat, "top_p", 1.5),
    (chat, "top_k", -2),
    (chat, "min_p", 2),
    (chat, "seed", 2**63),
    (chat, "seed", 1.5),
    (chat, "stop", ""),
    (chat, "stop", ["a"] * 17),
    (chat, "stop", ["a" * 1025]),
    (chat, "presence_penalty", 3),
    (chat, "frequency_penalty", -3),
    (chat, "repetition_penalty", 0),
    (chat, "n", True),
    (chat, "n", 0),
    (chat, "n", 129),
    (chat, "logit_bias", {"5": 101}),
    (chat, "logit_bias", {"word": 1}),
    (chat, "logprobs", 3),
    (chat, "top_logprobs", 21),
    (chat, "top_logprobs", 2),
    (chat, "allowed_token_ids", []),
    (chat, "bad_words", [""]),
    (chat, "truncate_prompt_tokens", 0),
    (chat, "priority", 5000),
    (chat, "continue_final_message", True),
    (completion, "max_tokens", 0),
    (completion, "logprobs", 21),
    (completion, "logprobs", True),
    (completion, "best_of", 0),
    (chat, "stream", "yes"),
    (chat, "messages", []),
    (chat, "messages", [{"role": "user", "content": "x"}] * 16385),
    (chat, "messages", None),
    (chat, "model", None),
    (chat, "ignore_eos", 1),
    (completion, "prompt", None),
    (completion, "prompt", []),
]


@pytest.mark.parametrize(("make", "field", "value"), OUT_OF_RANGE)
def test_a_bad_value_names_its_field(make, field, value):
    param = refusal(make, **{field: value}).param
    assert param is not None
    assert re.split(r"[.\[]", param)[0] == field


@pytest.mark.parametrize(
    ("make", "fields", "param"),
    [
        (completion, {"n": 3, "best_of": 2}, "best_of"),
        (completion, {"best_of": 2, "stream": True}, "best_of"),
        (completion, {"suffix": "x", "echo": True}, "suffix"),
        (chat, {"allowed_token_ids": [1], "bad_words": ["x"]}, "allowed_token_ids"),
        (chat, {"max_tokens": 0}, "max_tokens"),
    ],
)
def test_fields_that_exclude_each_other(make, fields, param):
    assert refusal(make, **fields).param == param


BAD_MESSAGES = [
    ({"role": "robot", "content": "x"}, "messages[0].role"),
    ({"content": "x"}, "messages[0].role"),
    ({"role": "user"}, "messages[0].content"),
    ({"role": "user", "content": None}, "messages[0].content"),
    ({"role": "user", "content": "x", "weight": 1}, "messages[0].weight"),
    (
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        "messages[0].content[0].type",
    ),
    ({"role": "assistant", "content": None}, "messages[0].content"),
    ({"role": "assistant", "content": "x", "refusal": "no"}, "messages[0].refusal"),
    ({"role": "assistant", "content": "x", "audio": {"id": "1"}}, "messages[0].audio"),
    ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
]


@pytest.mark.parametrize(("message", "param"), BAD_MESSAGES)
def test_a_bad_message_names_its_place(message, param):
    assert refusal(chat, messages=[message]).param == param


@pytest.mark.parametrize("make", [chat, completion])
def test_an_unknown_field_is_refused(make):
    error = refusal(make, temprature=1)
    assert error.param == "temprature"


@pytest.mark.parametrize(("make", "params"), [(chat, ChatParams), (completion, CompletionParams)])
def test_null_for_any_optional_field_of_the_schema_is_harmless(make, params):
    optional = set(params.__annotations__) - {"model", "messages", "prompt"}
    make(**dict.fromkeys(optional))


@pytest.mark.parametrize("field", REFUSED)
def test_values_that_ask_for_nothing_are_harmless(field):
    for value in REFUSED[field]:
        chat(**{field: value})


def test_fields_without_effect_are_accepted():
    chat(
        user="u",
        safety_identifier="s",
        prompt_cache_key="k",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        parallel_tool_calls=True,
    )


def test_a_reply_can_be_sent_back():
    reply = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    assert chat(messages=[*MESSAGES, reply]).messages[1].content == "x"


def test_stream_options_need_a_stream():
    assert refusal(chat, stream_options={"include_usage": True}).param == "stream_options"
    assert chat(stream=True, stream_options={"include_usage": True, "include_obfuscation": False})
    error = refusal(chat, stream=True, stream_options={"include_everything": True})
    assert error.param == "stream_options.include_everything"


def test_max_tokens_and_max_completion_tokens_must_agree():
    assert chat(max_tokens=5, max_completion_tokens=5).token_limit == (5, "max_completion_tokens")
    assert chat(max_tokens=5).token_limit == (5, "max_tokens")
    assert refusal(chat, max_tokens=5, max_completion_tokens=6).param == "max_tokens"


def test_stop_is_one_string_or_several():
    assert chat().stop_strings == []
    assert chat(stop="a").stop_strings == ["a"]
    assert chat(stop=["a", "b"]).stop_strings == ["a", "b"]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompt_forms(prompt, prompts):
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize("prompt", [["a", 1], [1, [2]], ["a", ["b"]], [-1], ["a"] * 1025])
def test_a_prompt_of_mixed_or_bad_forms_is_refused(prompt):
    with pytest.raises(ApiError) as caught:
        _ = completion(prompt=prompt).prompts
    assert caught.value.status == 400
    assert caught.value.param.startswith("prompt")


BAD_BODIES = {
    "empty": b"",
    "cut off": b'{"model": "m"',
    "array": b"[]",
    "number": b"3",
    "trailing": b'{"model": "m", "messages": []} x',
    "NUL byte": b'{"model": "m\x00"}',
    "not UTF-8": b'{"model": "\xff"}',
    "lone surrogate": rb'{"model": "m", "messages": [{"role": "user", "content": "\ud800 x"}]}',
    "surrogate bytes": b'{"model": "\xed\xa0\x80"}',
    "NaN": b'{"model": "m", "temperature": NaN}',
    "deep": b'{"model": "m", "audio": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep and cut off": b"[" * 100_000,
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_body_that_is_no_request_is_refused(body):
    with pytest.raises(ApiError) as caught:
        CHAT.decode(body)
    assert caught.value.status == 400


@settings(deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_bytes_decode_or_are_refused(body):
    with pytest.raises(ApiError):
        CHAT.decode(body)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted(ChatCompletionRequest.__struct_fields__)), JSON_VALUES, max_size=4
    )
)
def test_any_values_are_accepted_or_refused(fields):
    body = json.dumps({"model": "m", "messages": MESSAGES, **fields}).encode()
    with contextlib.suppress(ApiError):
        CHAT.decode(body)


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": MESSAGES}])
def test_tokenize_takes_a_prompt_or_messages(body):
    with pytest.raises(ApiError, match="either prompt or messages"):
        RequestDecoder(TokenizeRequest).decode(json.dumps(body).encode())


def test_a_field_that_is_nearly_one_is_told():
    with pytest.raises(ApiError, match=r"did you mean temperature\?"):
        chat(temprature=1)
    with pytest.raises(ApiError, match="leave it out"):
        chat(nonsense_of_no_kind=1)


@pytest.mark.parametrize(
    ("make", "field", "advice"),
    [
        (completion, "max_completion_tokens", "did you mean max_tokens?"),
        (completion, "response_format", "did you mean structured_outputs.json?"),
        (chat, "guided_json", "did you mean structured_outputs.json?"),
        (chat, "length_penalty", "leave it out."),
    ],
)
def test_what_is_called_otherwise_here_is_told(make, field, advice):
    assert refusal(make, **{field: 1}).message.endswith(advice)


@pytest.mark.parametrize(
    ("field", "value", "types"),
    [
        ("response_format", {"type": "json"}, "text, json_object or json_schema"),
        ("tools", [{"type": "foo", "function": {"name": "a"}}], "only function"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "only text"),
    ],
)
def test_a_wrong_type_is_told_with_the_right_ones(field, value, types):
    assert f".type: {types} is supported." in refusal(chat, **{field: value}).message


def test_no_stop_strings_are_none():
    assert chat(stop=[]).stop_strings == []


def test_an_effort_is_one_of_those_there_are():
    assert chat(reasoning_effort="xhigh").reasoning_effort == "xhigh"
    assert refusal(chat, reasoning_effort="banana").param == "reasoning_effort"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "tools": []}, "tools"),
        ({"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x"),
    ],
)
def test_tokenize_takes_of_each_what_belongs_to_it(body, param):
    with pytest.raises(ApiError) as caught:
        RequestDecoder(TokenizeRequest).decode(json.dumps(body).encode())
    assert caught.value.param == param
