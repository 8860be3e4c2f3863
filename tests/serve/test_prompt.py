"""Messages through a chat template to token ids."""

import asyncio
import datetime
import json

import pytest
from fake_backend import TEMPLATE, RenderHere, byte_level_tokenizer

from quire.serve.errors import ApiError
from quire.serve.openai_protocol import ChatCompletionRequest
from quire.serve.parsers.events import CallStarted
from quire.serve.parsers.families import ParserFactory, infer_family
from quire.serve.parsers.schemas import Tools
from quire.serve.prompt import (
    ChatTemplate,
    encode_chat,
    encode_texts,
    render_chat,
    switches_read,
)
from quire.serve.prompt_length import length_limit
from quire.serve.request_decoder import RequestDecoder
from quire.serve.text_encoder import TextEncoder

DECODER = RequestDecoder(ChatCompletionRequest)


def messages(*items: dict[str, object]):
    return DECODER.decode(json.dumps({"model": "m", "messages": items}).encode()).messages


def render(source: str, *items: dict[str, object], **special: str) -> str:
    return ChatTemplate(source, special).render(messages(*items)).text


USER = {"role": "user", "content": "hi"}
DUMP = "{{ messages | tojson }}"


def test_the_assistant_is_asked_to_speak():
    assert render(TEMPLATE, USER) == "<user>hi\n<assistant>"


def test_content_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", {"role": "user", "content": parts}) == "ab"


@pytest.mark.parametrize(
    ("source", "role"),
    [
        ("{{ messages[0].role }}{{ messages[0].content }}", "systemx"),
        ("{# developer #}{{ messages[0].role }}{{ messages[0].content }}", "developerx"),
    ],
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
        {"role": "tool", "content": "42", "tool_call_id": "c1", "name": "f"},
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
        asyncio.run(render_chat(None, messages(USER)))


def test_special_tokens_are_added_to_completions_only():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level_tokenizer()
    end = tokenizer.token_to_id("<|end|>")
    tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", end)]
    )
    encoder = TextEncoder(tokenizer)
    template = RenderHere("{{ messages[0].content }}", {})
    rendered = asyncio.run(render_chat(template, messages(USER)))
    chat = asyncio.run(encode_chat(encoder, rendered, length_limit(encoder, None)))
    [completion] = asyncio.run(encode_texts(encoder, ["hi"]))
    assert completion == [end, *chat.token_ids]


def test_a_prompt_that_cannot_fit_is_refused_by_its_length(monkeypatch):
    encoder = TextEncoder(byte_level_tokenizer())
    monkeypatch.setattr(encoder, "encode_here", None)  # which would show if it were read
    with pytest.raises(ApiError) as caught:
        asyncio.run(encode_texts(encoder, ["fits", "x" * 5000], 10))
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
    template = RenderHere("{{ messages[0].content * 1000 }}", {})
    rendered = asyncio.run(render_chat(template, messages(USER)))
    with pytest.raises(ApiError, match="at least 286 by its length alone") as caught:
        asyncio.run(encode_chat(encoder, rendered, length_limit(encoder, 100)))
    assert (caught.value.param, caught.value.code) == ("messages", "context_length_exceeded")


def history(*calls: str, reasoning: str | None = None, content: str | None = None):
    made = [
        {"id": f"id{i}", "type": "function", "function": {"name": name, "arguments": "{}"}}
        for i, name in enumerate(calls)
    ]
    turn = {"role": "assistant", "content": content, "tool_calls": made, "reasoning": reasoning}
    results = [
        {"role": "tool", "content": f"result of {name}", "tool_call_id": f"id{i}"}
        for i, name in enumerate(calls)
    ]
    return [USER, turn, *results]


ALL = "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}BODY{% endfor %}"


def every_turn(body: str) -> str:
    return ALL.replace("BODY", body)


NAMES = (
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}{{ c.function.arguments | tojson }}]"
    "{% endfor %}"
)
ONE = NAMES + "{% if m.tool_calls|length > 1 %}{{ raise_exception('one call') }}{% endif %}"


def test_calls_and_results_are_paired_for_templates_that_take_one_call_a_turn():
    both = "<user>hi<assistant>[f{}][g{}]<tool>result of f<tool>result of g"
    assert render(every_turn(NAMES), *history("f", "g")) == both
    assert render(every_turn(ONE), *history("f", "g")) == (
        "<user>hi<assistant>[f{}]<tool>result of f<assistant>[g{}]<tool>result of g"
    )


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_goes_under_the_name_that_the_template_reads(key):
    source = every_turn("{% if m." + key + " %}({{ m." + key + " }}){% endif %}" + NAMES)
    text = render(source, *history("f", reasoning="Hm"))
    assert text == "<user>hi<assistant>(Hm)[f{}]<tool>result of f"


def test_content_beside_reasoned_calls_gets_a_turn_of_its_own_where_it_must():
    refuses = (
        "{% if m.thinking and m.content %}{{ raise_exception('both') }}{% endif %}{{ m.thinking }}"
    )
    text = render(every_turn(refuses + NAMES), *history("f", reasoning="Hm", content="Wait."))
    assert text == "<user>hi<assistant>Wait.<assistant>Hm[f{}]<tool>result of f"


def test_results_are_attached_where_the_template_reads_them_there():
    attached = "{% for r in m.tool_responses or [] %}({{ r.name }}: {{ r.response }}){% endfor %}"
    text = render(every_turn(NAMES + attached), *history("f", "g"))
    assert text == "<user>hi<assistant>[f{}][g{}](f: result of f)(g: result of g)"


SYSTEM_FIRST = (
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}{% endif %}"
)
ALTERNATING = (
    "{% if not loop.first and m.role == 'user' and messages[loop.index0 - 1].role == 'user' %}"
    "{{ raise_exception('alternate') }}{% endif %}"
)
LATE = [
    {"role": "system", "content": "s"},
    USER,
    {"role": "system", "content": "late"},
    USER,
]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("", "<system>s<user>hi<system>late<user>hi"),
        (SYSTEM_FIRST, "<system>s<user>hi<user>REMINDER<user>hi"),
        (SYSTEM_FIRST + ALTERNATING, "<system>s<user>hi\n\nREMINDER\n\nhi"),
    ],
)
def test_late_instructions_stay_where_they_stand(rules, expected):
    reminder = "<system-reminder>\nlate\n</system-reminder>"
    assert render(every_turn(rules), *LATE) == expected.replace("REMINDER", reminder)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [("", "<system>a<system>b<user>hi"), (SYSTEM_FIRST, "<system>a\n\nb<user>hi")],
)
def test_several_instructions_in_front_are_one_turn_where_no_more_are_taken(rules, expected):
    front = [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, USER]
    assert render(every_turn(rules), *front) == expected


def test_tools_keep_the_order_of_their_keys_and_switches_are_variables():
    template = ChatTemplate("{{ tools | tojson }}{{ enable_thinking }}", {})
    tool = {"function": {"parameters": {"z": 1, "a": 2}}}
    text = template.render(messages(USER), [tool], {"enable_thinking": False}).text
    assert text == '[{"function": {"parameters": {"z": 1, "a": 2}}}]False'


@pytest.mark.parametrize(
    ("source", "switches"),
    [
        ("{{ messages[0].thinking }}{# enable_thinking #}enable_thinking", ()),
        ("{% if enable_thinking is defined %}a{% endif %}", ("enable_thinking",)),
        ("{% if not thinking is defined %}{% set thinking = true %}{% endif %}", ("thinking",)),
        ("{% set reasoning_effort = reasoning_effort or 'low' %}", ("reasoning_effort",)),
        ("{{ 'x' * 10 ** 12 if enable_thinking }}", ("enable_thinking",)),  # is not computed
    ],
)
def test_which_switches_a_template_reads(source, switches):
    assert switches_read(source) == switches


def test_what_opens_the_answer():
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% if enable_thinking is not false %}<think>"
        "{% endif %}{% endif %}"
    )
    template = ChatTemplate(source, {})
    assert template.opening({}) == "<assistant><think>"
    assert template.opening({"enable_thinking": False}) == "<assistant>"


ONLY_SILENT_CALLS = (
    "{% if m.content is not none %}{{ m.content }}{% else %}{% for c in m.tool_calls %}"
    "[{{ c.function.name }}]{% endfor %}{% endif %}"
)
NO_TWO_IN_A_ROW = (
    "{% if not loop.first and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('alternate') }}{% endif %}"
)
TURNS = "{% for m in messages %}<{{ m.role }}>BODY{% endfor %}"


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("", "<user>hi<assistant>Wait.<assistant>[f]<tool>result of f"),
        (NO_TWO_IN_A_ROW, "<user>hi<assistant>[f]<tool>result of f"),
    ],
)
def test_calls_are_not_lost_beside_content(rules, expected):
    source = TURNS.replace("BODY", rules + ONLY_SILENT_CALLS)
    # Arguments are looked for in what such a template writes.
    source = source.replace("c.function.name }}", "c.function.name }}{{ c.function.arguments }}")
    text = render(source, *history("f", content="Wait.")).replace("{}", "")
    assert text == expected


CITY = '{"city": "R\\u00f6m", "days": 2, "warm": true, "why": null, "at": ["a\\"b"]}'


@pytest.mark.parametrize(
    ("sign", "written"),
    [
        (
            "<|tool_list_start|>",
            '<|tool_call_start|>[f(city="Röm", days=2, warm=True, why=None, at=["a\\"b"]), g()]'
            "<|tool_call_end|>",
        ),
        (
            "<|tool_call|>",
            '<|tool_call|>[{"name": "f", "arguments": {"city": "Röm", "days": 2, "warm": true, '
            '"why": null, "at": ["a\\"b"]}}, {"name": "g", "arguments": {}}]',
        ),
        ("", ""),  # a family that calls nothing: at least what was said stays
    ],
)
def test_calls_stay_in_the_history_of_templates_that_know_of_none(sign, written):
    source = "{% if tools %}" + sign + "{% endif %}" + every_turn("")
    turns = history("f", "g", content="Wait.")
    turns[1]["tool_calls"][0]["function"]["arguments"] = CITY
    text = render(source, *turns)
    assert text == f"<user>hi<assistant>Wait.{written}<tool>result of f<tool>result of g"
    parsers = ParserFactory(infer_family(source, byte_level_tokenizer()), None)
    if sign:
        tools = Tools({"f": None, "g": None})
        events = parsers.parser(tools).push(written)
        names = [event.name for event in events if isinstance(event, CallStarted)]
        assert names == ["f", "g"]
