"""anthropic: create, a stream, tools, their results, and counted tokens."""

import sys

import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0)
HELLO = [{"role": "user", "content": "Hello"}]
OPTIONS = {"model": "claude-x", "max_tokens": 100, "extra_body": {"temperature": 0}}
TOOL = {
    "name": "look",
    "description": "Looks at the sky.",
    "input_schema": {
        "type": "object",
        "properties": {"warm": {"type": "boolean"}},
        "required": ["warm"],
    },
}

whole = client.messages.create(messages=HELLO, **OPTIONS)
[block] = whole.content
assert block.type == "text"
assert block.text
with client.messages.stream(messages=HELLO, **OPTIONS) as stream:
    assert "".join(stream.text_stream) == block.text
    assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens

called = client.messages.create(
    messages=HELLO, tools=[TOOL], tool_choice={"type": "any"}, system="Be kind.", **OPTIONS
)
assert called.stop_reason == "tool_use"
call = next(block for block in called.content if block.type == "tool_use")
assert isinstance(call.input["warm"], bool)
history = [
    *HELLO,
    {"role": "assistant", "content": called.content},
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": each.id, "content": "warm"}
            for each in called.content
            if each.type == "tool_use"
        ],
    },
]
after = client.messages.create(messages=history, tools=[TOOL], **OPTIONS)
assert after.stop_reason in ("end_turn", "tool_use", "max_tokens")

counted = client.messages.count_tokens(model="claude-x", messages=HELLO)
usage = whole.usage
assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
